// out = softmax(scale Q K^T + mask) V and its gradient, without the matrix of scores.
#pragma once

#include "../core/parallel.h"

namespace pykernels {

struct AttentionSizes {
  int64_t B, N, N_kv, S_q, S_k, D, D_v;  // N is a multiple of N_kv
  int64_t first, last;                   // query i sees keys j only where first <= j - i <= last
  int64_t diagonal;                      // the own place of query i is key i + diagonal
  double scale;
  double softcap;  // scores become softcap tanh(score / softcap); 0 for not
};

// Sequences that lie one behind the other: S_q and S_k count the rows of all of them, batch strides
// mean nothing, and what is kept by query is [N, S_q].
struct AttentionPacking {
  const int64_t* queries;  // [B + 1]: where each sequence begins in q; nullptr if nothing is packed
  const int64_t* keys;     // [B + 1], in k and v; nullptr if these have a batch axis, or pages
  const int64_t* used;     // [B]: how many of its keys count; nullptr for all
  int64_t longest_q, longest_k;
  bool ends_meet;  // first, last and diagonal are from where a last query stands at its last key
};

// A tensor [B, heads, rows, columns] whose columns are contiguous; strides in elements.
template <class S>
struct Heads {
  S* data;
  int64_t batch, head, row;
  const int64_t* starts = nullptr;  // [B + 1], the first row of each sequence if these are packed

  S* at(int64_t b, int64_t h, int64_t i) const {
    return data + (starts ? starts[b] * row : b * batch) + h * head + i * row;
  }
};

// Keys and values in pages of `size` rows: that of row j of sequence b is table[b, j / size], and a
// batch stride leads from page to page.
struct AttentionPages {
  const int64_t* table;  // [B, per_sequence]; nullptr for none
  int64_t per_sequence, size;
};

// What forward leaves for backward, by query: a weight is exp((score - top) * unit) * inverse,
// where unit is the scale or 1. The log-sum-exp would say the same in one number, but rounded at
// the size of a score, where a weight magnifies that.
template <class T>
struct AttentionRows {
  // In the forward pass nullptr, both, if there will be no backward.
  // What scores are measured from: near the largest, 0 where all are small, or of the log-sum-exp;
  // +inf in a row that sees no key.
  T* top;
  T* inverse;  // of the sum of the row's powers
};

// [B, N, S_q, S_k] of any strides, 0 where it broadcasts.
struct AttentionMask {
  enum Kind : int { kNone, kBoolean, kAdditive };
  Kind kind;
  const void* data;  // uint8_t, nonzero = attend; or S, added to the scores
  int64_t batch, head, row, column;
};

// What makes weights of products, but for the sizes.
template <class S>
struct AttentionRule {
  AttentionMask mask;
  const S* sinks;              // [N] or nullptr: the score of a key that has no value
  const compute_t<S>* slopes;  // [B or 1, N] or nullptr: what a step away from the own place costs
  int64_t slopes_batch;        // their stride
  const int64_t* seed;         // of the weights that are dropped
  double dropout;              // their share; 0 for none
};

template <class S>
struct AttentionForward {
  AttentionSizes sizes;
  AttentionPacking packing;
  AttentionRule<S> rule;
  Heads<const S> q, k, v;
  AttentionPages pages;
  Heads<S> out;       // [B, N, S_q, D_v]
  compute_t<S>* lse;  // [B, N, S_q] or nullptr, natural log
  AttentionRows<compute_t<S>> rows;
};

// A gradient that is not wanted has nullptr for data.
template <class S>
struct AttentionBackward {
  AttentionSizes sizes;
  AttentionPacking packing;
  AttentionRule<S> rule;
  Heads<const S> q, k, v;
  Heads<const S> out;  // [B, N, S_q, D_v], of the forward pass
  AttentionRows<const compute_t<S>> rows;
  bool whole;                // these are of all keys that `out` is of, not of some
  Heads<const S> dout;       // [B, N, S_q, D_v]
  const compute_t<S>* dlse;  // [B, N, S_q] or nullptr for zeros
  Heads<S> dq;               // [B, N, S_q, D]
  Heads<S> dk;               // [B, N_kv, S_k, D]
  Heads<S> dv;               // [B, N_kv, S_k, D_v]
  // Cleared, and added to: [B, N, S_q, S_k], with strides of 0 where the mask broadcasts.
  Heads<compute_t<S>> dmask;
  S* dsinks;  // [N]
};

template <class S>
void attention_forward(int threads, const AttentionForward<S>& p);

template <class S>
void attention_backward(int threads, const AttentionBackward<S>& p);

}  // namespace pykernels
