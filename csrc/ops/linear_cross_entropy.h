// The cross-entropy of logits z = x W^T + b and its gradient, without the matrix of logits.
#pragma once

#include "../core/gemm.h"

namespace pykernels {

struct LinearCrossEntropySizes {
  int64_t N, H, V;
};

// Of row i with target t, where u_i, a number for each row, says how much its loss counts:
//
//   loss  = (1 - smoothing) w_t (lse - z_t) + smoothing / V sum_c w_c (lse - z_c)
//   d z_c = u (d loss / d z_c) + (dlse_i + lse_rate lse) exp(z_c - lse)
//
// What is not wanted, or not given, is nullptr.
template <class S>
struct LinearCrossEntropy {
  using T = compute_t<S>;

  LinearCrossEntropySizes sizes;
  const S* x;               // [N, H]
  const S* weight;          // [V, H]
  const S* bias;            // [V]
  const int64_t* target;    // [N], each from 0 to V - 1 or ignore_index
  const T* class_weight;    // [V], w; ones if not given
  double class_weight_sum;  // of w
  double smoothing;
  int64_t ignore_index;

  // Made by the forward pass, or given to a backward pass.
  T* top;      // [N], the largest logit
  T* inverse;  // [N], of sum_c exp(z_c - top)
  bool known;  // given: the logits of a tile then become gradients at once

  T* loss;          // [N], 0 where ignored
  T* lse;           // [N]
  int64_t* argmax;  // [N], the first of the largest

  // Any of the three asks for gradients.
  T* dx;               // [N, H]
  T* dweight;          // [V, H]
  T* dbias;            // [V]
  const T* loss_rate;  // [N], u; ignored rows count for nothing
  const T* dlse;       // [N]
  double lse_rate;     // of the rows that are not ignored
};

template <class S>
void linear_cross_entropy(int threads, const LinearCrossEntropy<S>& p);

}  // namespace pykernels
