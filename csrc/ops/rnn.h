// h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), f = tanh or relu, over a whole sequence.
#pragma once

#include "../core/parallel.h"

namespace pykernels {

struct RnnSizes {
  int64_t T, B, I, H;
  bool relu;     // else tanh
  bool reverse;  // walk from step T - 1 to 0
};

// All row-major and contiguous, stored as S.
template <class S>
struct RnnForward {
  RnnSizes sizes;
  const S* x;     // [T, B, I]
  const S* w_ih;  // [H, I]
  const S* w_hh;  // [H, H]
  const S* b_ih;  // [H] or nullptr
  const S* b_hh;  // [H] or nullptr
  const S* h0;    // [B, H] or nullptr for zeros
  S* y;           // [T, B, H], out
  S* h_n;         // [B, H], out
};

// A gradient that is not wanted is nullptr.
template <class S>
struct RnnBackward {
  RnnSizes sizes;
  const S* x;     // [T, B, I]
  const S* w_ih;  // [H, I]
  const S* w_hh;  // [H, H]
  const S* h0;    // [B, H] or nullptr for zeros
  const S* y;     // [T, B, H], of the forward pass
  const S* dy;    // [T, B, H] or nullptr for zeros
  const S* dh_n;  // [B, H] or nullptr for zeros
  S* dx;          // [T, B, I]
  S* dw_ih;       // [H, I]
  S* dw_hh;       // [H, H]
  S* db;          // [H], the gradient of either bias
  S* dh0;         // [B, H]
};

template <class S>
void rnn_forward(int threads, const RnnForward<S>& p);

template <class S>
void rnn_backward(int threads, const RnnBackward<S>& p);

}  // namespace pykernels
