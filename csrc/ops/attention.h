// out = softmax(scale Q K^T + mask) V and its gradient, without the matrix of scores.
#pragma once

#include "../core/parallel.h"

namespace pykernels {

struct AttentionSizes {
  int64_t B, N, N_kv, S_q, S_k, D, D_v;  // N is a multiple of N_kv
  int64_t first, last;                   // query i sees keys j only where first <= j - i <= last
  double scale;
  double softcap;  // scores become softcap tanh(score / softcap); 0 for not
};

// A tensor [B, heads, rows, columns] whose columns are contiguous; strides in elements.
template <class S>
struct Heads {
  S* data;
  int64_t batch, head, row;

  S* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

// What forward leaves for backward, both [B, N, S_q]: a weight is exp((score - top) * unit) *
// inverse, where unit is the scale or 1. The log-sum-exp would say the same in one number, but
// rounded at the size of a score, where a weight magnifies that.
template <class T>
struct AttentionRows {
  T* top;      // the largest score; +inf in a row that sees no key
  T* inverse;  // of the sum of the row's powers
};

// [B, N, S_q, S_k] of any strides, 0 where it broadcasts.
struct AttentionMask {
  enum Kind : int { kNone, kBoolean, kAdditive };
  Kind kind;
  const void* data;  // uint8_t, nonzero = attend; or S, added to the scores
  int64_t batch, head, row, column;
};

template <class S>
struct AttentionForward {
  AttentionSizes sizes;
  Heads<const S> q, k, v;
  AttentionMask mask;
  const S* sinks;     // [N] or nullptr: the score of a key that has no value
  S* out;             // [B, N, S_q, D_v]
  compute_t<S>* lse;  // [B, N, S_q], natural log
  AttentionRows<compute_t<S>> rows;
};

// A gradient that is not wanted is nullptr.
template <class S>
struct AttentionBackward {
  AttentionSizes sizes;
  Heads<const S> q, k, v;
  AttentionMask mask;
  const S* sinks;  // [N] or nullptr
  const S* out;    // [B, N, S_q, D_v], of the forward pass
  AttentionRows<const compute_t<S>> rows;
  Heads<const S> dout;       // [B, N, S_q, D_v]
  const compute_t<S>* dlse;  // [B, N, S_q] or nullptr for zeros
  S* dq;                     // [B, N, S_q, D]
  S* dk;                     // [B, N_kv, S_k, D]
  S* dv;                     // [B, N_kv, S_k, D_v]
  // Cleared, and added to: [B, N, S_q, S_k], with strides of 0 where the mask broadcasts.
  Heads<compute_t<S>> dmask;
  S* dsinks;  // [N]
};

template <class S>
void attention_forward(int threads, const AttentionForward<S>& p);

template <class S>
void attention_backward(int threads, const AttentionBackward<S>& p);

}  // namespace pykernels
