// What the passes of attention share: which keys a query sees, what becomes of its scores, and how
// rows are packed.
#pragma once

#include <cmath>
#include <limits>

#include "../core/gemm.h"
#include "../core/philox.h"
#include "../core/prefetch.h"
#include "../core/vec_math.h"
#include "attention.h"

namespace pykernels {

// The longest sum that is one chain of additions: longer ones are made of several, for the error of
// a chain grows with its length. Each further chain costs one load and store of the tile.
constexpr int64_t kChain = 128;

// Rows of scores are this much longer than a block of keys, so that they do not share cache sets.
constexpr int64_t kRowPad = 16;

// The sizes of sequence b alone.
inline AttentionSizes sequence(const AttentionSizes& all, const AttentionPacking& packing,
                               int64_t b) {
  AttentionSizes n = all;
  if (!packing.queries) return n;
  n.S_q = packing.queries[b + 1] - packing.queries[b];
  if (packing.keys) n.S_k = packing.keys[b + 1] - packing.keys[b];
  if (packing.used) n.S_k = packing.used[b];
  const int64_t shift = packing.ends_meet ? n.S_k - n.S_q : 0;
  n.first += shift;
  n.last += shift;
  n.diagonal += shift;
  return n;
}

// Where what is kept by query has query i of sequence b.
PK_INLINE int64_t row_of(const AttentionSizes& all, const AttentionPacking& packing, int64_t b,
                         int64_t h, int64_t i) {
  return packing.queries ? h * all.S_q + packing.queries[b] + i : (b * all.N + h) * all.S_q + i;
}

// The queries of the longest sequence.
inline int64_t longest_queries(const AttentionSizes& all, const AttentionPacking& packing) {
  return packing.queries ? packing.longest_q : all.S_q;
}

// The keys out of `keys` that any of some queries may see, counted from keys.begin; empty if none.
PK_INLINE Range visible_keys(const AttentionSizes& n, Range queries, Range keys) {
  const int64_t begin = std::max(keys.begin, queries.begin + n.first) - keys.begin;
  const int64_t end = std::min(keys.end, queries.end + n.last) - keys.begin;
  return begin < end ? Range{begin, end} : Range{0, 0};
}

// The queries out of `queries` that see any of some keys, counted from queries.begin; empty if
// none.
PK_INLINE Range visible_queries(const AttentionSizes& n, Range queries, Range keys) {
  const int64_t begin = std::max(queries.begin, keys.begin - n.last) - queries.begin;
  const int64_t end = std::min(queries.end, keys.end - n.first) - queries.begin;
  return begin < end ? Range{begin, end} : Range{0, 0};
}

// Whether all of some queries see all of `keys`.
PK_INLINE bool all_visible(const AttentionSizes& n, Range queries, Range keys) {
  return queries.end - 1 + n.first <= keys.begin && keys.end <= queries.begin + 1 + n.last;
}

// Whether the scale may wait until a score becomes a weight: nothing is added to scaled scores or
// made of them before, and -inf stays -inf under it.
template <class S, class T = compute_t<S>>
bool scale_waits(const AttentionSizes& n, const AttentionRule<S>& rule) {
  return rule.mask.kind != AttentionMask::kAdditive && n.softcap == 0 && !rule.sinks &&
         !rule.slopes && T(n.scale) >= std::numeric_limits<T>::min();
}

// What one unit of the scores in memory is worth.
template <class S, class T = compute_t<S>>
T score_unit(const AttentionSizes& n, const AttentionRule<S>& rule) {
  return scale_waits(n, rule) ? T(n.scale) : T(1);
}

// `part` of one row of products to capped scores, and `growth`, where asked for, to what a score
// grows by as the scaled product does: tanh' = 1 - tanh^2, which is 4 e / (1 + e)^2 with
// e = exp(-2 |x|), where nothing cancels. In whole registers.
template <class T>
void cap_scores(const AttentionSizes& n, Range part, T* scores, T* growth) {
  const T cap = T(n.softcap), rate = T(n.scale / n.softcap);
  for (int64_t j = part.begin / lanes<T> * lanes<T>; j < part.end; j += lanes<T>) {
    const vec<T> x = load(scores + j) * rate;
    store(scores + j, cap * tanh<T>(x));
    if (growth) {
      const vec<T> e = exp<T>(-2 * max(x, -x));
      store(growth + j, 4 * e / ((1 + e) * (1 + e)));
    }
  }
}

// Brings `part` of one row of products, of keys from `first` on, into the unit, masked; `growth` as
// cap_scores has it.
template <class S, class T>
void finish_scores(const AttentionSizes& n, const AttentionRule<S>& rule, int64_t b, int64_t h,
                   int64_t i, int64_t first, Range part, T* scores, T* growth = nullptr) {
  const AttentionMask& mask = rule.mask;
  const int64_t start = b * mask.batch + h * mask.head + i * mask.row + first * mask.column;
  if (n.softcap > 0) cap_scores(n, part, scores, growth);
  T scale = n.softcap > 0 ? T(1) : static_cast<T>(n.scale);
  if (rule.slopes) {
    const T slope = rule.slopes[b * rule.slopes_batch + h];
    const int64_t place = i + n.diagonal - first;
    for (int64_t j = part.begin; j < part.end; ++j)
      scores[j] = scores[j] * scale - slope * std::abs(static_cast<T>(j - place));
    scale = 1;
  }
  if (mask.kind == AttentionMask::kAdditive) {
    const S* const bias = static_cast<const S*>(mask.data) + start;
    for (int64_t j = part.begin; j < part.end; ++j)
      scores[j] = scores[j] * scale + widen(bias[j * mask.column]);
    return;
  }
  if (!scale_waits(n, rule))
    for (int64_t j = part.begin; j < part.end; ++j) scores[j] *= scale;
  if (mask.kind == AttentionMask::kBoolean) {
    const uint8_t* const attend = static_cast<const uint8_t*>(mask.data) + start;
    for (int64_t j = part.begin; j < part.end; ++j)
      scores[j] = attend[j * mask.column] ? scores[j] : -kInfinity<T>;
  }
}

// keep[part] = what dropping makes of the weights of `part`, of keys from `first` on: 0, or what
// the others grow by. h counts the heads of all sequences.
template <class S, class T>
void draw_kept(const AttentionRule<S>& rule, int64_t h, int64_t i, int64_t first, Range part,
               T* keep) {
  const uint64_t seed = static_cast<uint64_t>(*rule.seed);
  const uint32_t dropped = static_cast<uint32_t>(std::min(rule.dropout * 0x1p32, 0x1p32 - 1));
  const T factor = rule.dropout < 1 ? T(1 / (1 - rule.dropout)) : T(0);
  uint32_t bits[kPhiloxBits];
  T drawn[kPhiloxBits];
  for (int64_t j = part.begin; j < part.end;) {
    const int64_t block = (first + j) / kPhiloxBits, at = (first + j) % kPhiloxBits;
    philox(seed, static_cast<uint32_t>(block), static_cast<uint32_t>(i), static_cast<uint32_t>(h),
           bits);
    for (int64_t x = 0; x < kPhiloxBits; ++x) drawn[x] = bits[x] < dropped ? T(0) : factor;
    const int64_t count = std::min(kPhiloxBits - at, part.end - j);
    std::copy_n(drawn + at, count, keep + j);
    j += count;
  }
}

// row[from, to) = value, where `to` is rounded up to whole registers.
template <class T>
PK_INLINE void fill(T* row, int64_t from, int64_t to, T value) {
  for (int64_t j = from; j < round_up(to, lanes<T>); ++j) row[j] = value;
}

// row *= factor, in whole registers.
template <class T>
PK_INLINE void scale_row(T* row, int64_t count, T factor) {
  for (int64_t j = 0; j < count; j += lanes<T>) store(row + j, load(row + j) * factor);
}

// The largest of `most` and scores[0, count), and the rest of the last register at -inf.
template <class T>
T row_maximum(T* scores, int64_t count, T most) {
  fill(scores, count, count, -kInfinity<T>);
  vec<T> even = broadcast(most), odd = even;
  int64_t j = 0;
  for (; j + lanes<T> < count; j += 2 * lanes<T>) {
    even = max(load(scores + j), even);
    odd = max(load(scores + j + lanes<T>), odd);
  }
  if (j < count) even = max(load(scores + j), even);
  return reduce_max(max(even, odd));
}

// scores[0, count) to weights 2^((score - top) rate), and zeros to `seen`; returns their sum. The
// difference comes first: a mask of the most negative number, times the rate, would be -inf.
template <class T>
T weigh(T* scores, int64_t count, int64_t seen, T top, T rate) {
  // With every score at -inf so far, any finite number gives the weights their zeros.
  const vec<T> from = broadcast(top == -kInfinity<T> ? T(0) : top);
  vec<T> total{};
  for (int64_t j = 0; j < count; j += lanes<T>) {
    const vec<T> weight = exp2_softmax<T>((load(scores + j) - from) * rate);
    total += weight;
    store(scores + j, weight);
  }
  fill(scores, round_up(count, lanes<T>), seen, T(0));
  return reduce_add(total);
}

// c [rows, panels] (+)= a b, with b packed in panels and c a multiple of a panel wide.
template <class T>
PK_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row,
                        int64_t a_step, const T* b, int64_t b_depth, bool accumulate, T* c,
                        int64_t c_row) {
  constexpr int64_t width = kPanel<T>;
  for_each_tile_column(
      {0, rows}, {0, ceil_div(columns, width)},
      [&](int64_t row, int64_t tiles, int64_t height, int64_t panel, int64_t wide) {
        multiply_tile(height, wide, depth, a + row * a_row, a_row, a_step,
                      b + panel * b_depth * width, b_depth * width, width, accumulate,
                      c + row * c_row + panel * width, c_row, tiles, height * a_row);
      });
}

// c = a b, with b packed in panels [depth, kPanel] and the sums made of several chains; zeros where
// the depth is 0.
template <class T>
PK_INLINE void multiply_in_chains(int64_t rows, int64_t columns, int64_t depth, const T* a,
                                  const T* b, T* c, int64_t c_row) {
  int64_t k = 0;
  do {
    multiply(rows, columns, std::min(kChain, depth - k), a + k, depth, 1, b + k * kPanel<T>, depth,
             k > 0, c, c_row);
    k += kChain;
  } while (k < depth);
}

// Rows [rows, columns], widened and contiguous, in whole registers: the next row covers what one
// writes past its end.
template <class T, class S>
void copy_rows(const S* from, int64_t from_row, int64_t rows, int64_t columns, T* to) {
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += columns)
    for (int64_t d = 0; d < columns; d += lanes<T>) store(to + d, load_n(from + d, columns - d));
}

// Rows in the dtype of the arithmetic, one right behind the other, in `copy`.
template <class T, class S>
const T* copied(View<S> rows, int64_t count, int64_t columns, T* copy) {
  copy_rows(rows.data, rows.row, count, columns, copy);
  return copy;
}

// The same, or these rows themselves where they lie so.
template <class T, class S>
const T* widened(View<S> rows, int64_t count, int64_t columns, T* copy) {
  if constexpr (std::is_same_v<S, T>)
    if (rows.row == columns) return rows.data;
  return copied(rows, count, columns, copy);
}

// Rows [j0, j0 + count) of head g of k or v: where they lie, or put together from their pages in
// `to`, [count, width].
template <class S>
View<S> rows_of(const Heads<const S>& from, const AttentionPages& pages, int64_t b, int64_t g,
                int64_t j0, int64_t count, int64_t width, S* to) {
  if (!pages.table) return {from.at(b, g, j0), from.row, 1};
  for (int64_t j = 0; j < count; ++j) {
    const int64_t page = pages.table[b * pages.per_sequence + (j0 + j) / pages.size];
    std::copy_n(from.at(page, g, (j0 + j) % pages.size), width, to + j * width);
  }
  return {to, width, 1};
}

template <class T, class S>
void pack_alone(View<S> from, int64_t depth, int64_t columns, T* to) {
  pack_panels<T>(Team{0, 1, nullptr}, from, depth, columns, to);
}

// Consecutive parts of one aligned buffer.
template <class T>
class Arena {
 public:
  explicit Arena(T* start) : next_(start) {}
  T* take(int64_t count) {
    T* const part = next_;
    next_ += padded(count);
    return part;
  }
  // Numbers are read and written in whole registers, past the end too.
  static int64_t padded(int64_t count) { return round_up(count + lanes<T>, kCacheLine); }

 private:
  T* next_;
};

// The next of `count` items; the team takes them in order. Which thread computes an item changes
// nothing in it.
class Items {
 public:
  explicit Items(int64_t count) : count_(count) {}
  bool take(int64_t* item) {
    *item = next_.fetch_add(1, std::memory_order_relaxed);
    return *item < count_;
  }

 private:
  const int64_t count_;
  std::atomic<int64_t> next_{0};
};

// Queries by heads that share a head of K and V, of the longest sequence.
inline int64_t rows_of_a_head(const AttentionSizes& n, const AttentionPacking& packing) {
  return n.N / std::max<int64_t>(1, n.N_kv) * longest_queries(n, packing);
}

// Forward for so few queries that to pack keys and values would cost more than it saves. What the
// backward pass weighs once more must be scores of the same order of additions: a forward pass that
// leaves it rows goes this way only where the backward pass will.
template <class S>
bool are_few(int threads, const AttentionForward<S>& p);
template <class S>
void attend_few(int threads, const AttentionForward<S>& p);

// Backward for few; other limits hold there.
template <class S>
bool are_few_backward(const AttentionSizes& n, const AttentionPacking& packing,
                      const AttentionRule<S>& rule);
template <class S>
void attend_few_backward(int threads, const AttentionBackward<S>& p);

// Forward for queries in panels, where few lanes of these stay empty and values are packed for
// many.
template <class S>
bool fill_panels(const AttentionForward<S>& p);
template <class S>
void attend_panels(int threads, const AttentionForward<S>& p);

}  // namespace pykernels
