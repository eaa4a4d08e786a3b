// What the passes of a few queries share: keys and values are read as they lie, row after row.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_tiles.h"

namespace pykernels {

// Keys whose scores become weights at a time. The processor fetches ahead of reads that go on in
// order, and has to find out anew where they turn from keys to values and back: seldom, by this.
constexpr int64_t kFewKeys = 512;

// Values from one row of these to the next.
constexpr int64_t kFewLine = kFewKeys + kRowPad;

// Pairs of registers of sums over rows at a time.
constexpr int kPairs = 4;

// The head of row r, of the queries by heads that share head g of K and V.
inline int64_t head_of_row(const AttentionSizes& n, int64_t g, int64_t r) {
  return g * (n.N / n.N_kv) + r / n.S_q;
}

// The spans of the keys of all sequences, and heads of K and V, each of which is one item: those of
// a sequence's head lie side by side, and a sequence without keys has none.
class Spans {
 public:
  // Of `length` keys.
  Spans(const AttentionSizes& all, const AttentionPacking& packing, int64_t length)
      : heads_(all.N_kv), length_(length), first_(all.B + 1) {
    for (int64_t b = 0; b < all.B; ++b)
      first_[b + 1] = first_[b] + heads_ * ceil_div(sequence(all, packing, b).S_k, length);
  }

  int64_t items() const { return first_.back(); }
  // Those of head g of sequence b.
  Range of(int64_t b, int64_t g) const {
    const int64_t each = (first_[b + 1] - first_[b]) / heads_;
    return {first_[b] + g * each, first_[b] + (g + 1) * each};
  }

  struct Place {
    int64_t b, g, first_key;
  };
  Place place(int64_t item) const {
    const int64_t b = std::upper_bound(first_.begin(), first_.end(), item) - first_.begin() - 1;
    const int64_t each = (first_[b + 1] - first_[b]) / heads_, at = item - first_[b];
    return {b, at / each, at % each * length_};
  }

 private:
  const int64_t heads_, length_;
  std::vector<int64_t> first_;  // [B + 1]: the first item of each sequence
};

// A row, widened, in the order of load_pair as far as there are whole pairs.
template <class S, class T = compute_t<S>>
void to_pairs(const S* from, int64_t count, T* to) {
  int64_t d = 0;
  for (; d + 2 * lanes<T> <= count; d += 2 * lanes<T>) {
    const vec_pair<T> part = load_pair(from + d);
    store(to + d, part.first);
    store(to + d + lanes<T>, part.second);
  }
  for (; d < count; d += lanes<T>) store(to + d, load_n(from + d, count - d));
}

// And back.
template <class S, class T = compute_t<S>>
void from_pairs(const T* from, int64_t count, S* to) {
  int64_t d = 0;
  for (; d + 2 * lanes<T> <= count; d += 2 * lanes<T>)
    store_pair(to + d, {load(from + d), load(from + d + lanes<T>)});
  for (; d < count; d += lanes<T>) store_n(to + d, load(from + d), count - d);
}

// The products of a row in pairs with the rows `seen` of a block, in whole registers of these. Each
// is read to its end before the next: the processor fetches ahead of reads that go on in order. To
// take a column of many rows at a time spares loads of the one, and all but stops that.
template <class S, class T = compute_t<S>>
void multiply_rows(const T* one, View<S> rows, int64_t columns, Range seen, T* products) {
  constexpr int width = lanes<T>;
  const auto row_at = [&](int64_t j) { return rows.at(std::min(j, seen.end - 1), 0).data; };
  const int64_t pairs = columns / (2 * width) * (2 * width);
  for (int64_t j = seen.begin / width * width; j < seen.end; j += width) {
    vec<T> sums[width];
#pragma GCC unroll 16
    for (int x = 0; x < width; ++x) {
      const S* const row = row_at(j + x);
      vec<T> first{}, second{};
      for (int64_t d = 0; d < pairs; d += 2 * width) {
        const vec_pair<T> part = load_pair(row + d);
        first += load(one + d) * part.first;
        second += load(one + d + width) * part.second;
      }
      sums[x] = first + second;
    }
    for (int64_t d = pairs; d < columns; d += width)
#pragma GCC unroll 16
      for (int x = 0; x < width; ++x)
        sums[x] += load(one + d) * load_n(row_at(j + x) + d, columns - d);
    store(products + j, sum_of_each(sums));
  }
}

// Whole pairs of registers of out += the rows `mine`, weighed, from column d on: kCount at a time
// and then fewer. Returns the first column that is left.
template <int kCount, class S, class T>
int64_t add_pairs(const T* weights, View<S> rows, int64_t columns, Range mine, int64_t d, T* out) {
  constexpr int64_t width = lanes<T>;
  for (; d + 2 * kCount * width <= columns; d += 2 * kCount * width) {
    vec<T> sums[2 * kCount] = {};
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      const S* const row = rows.at(j, d).data;
      const vec<T> weight = broadcast(weights[j]);
#pragma GCC unroll 4
      for (int x = 0; x < kCount; ++x) {
        const vec_pair<T> part = load_pair(row + 2 * x * width);
        sums[2 * x] += weight * part.first;
        sums[2 * x + 1] += weight * part.second;
      }
    }
    for (int x = 0; x < 2 * kCount; ++x)
      store(out + d + x * width, load(out + d + x * width) + sums[x]);
  }
  if constexpr (kCount > 1) return add_pairs<kCount / 2>(weights, rows, columns, mine, d, out);
  return d;
}

// out, in pairs, += the rows `mine`, weighed; in sums of kChain rows.
template <class S, class T = compute_t<S>>
void add_rows(const T* weights, View<S> rows, int64_t columns, Range mine, T* out) {
  for (int64_t j0 = mine.begin; j0 < mine.end; j0 += kChain) {
    const Range chain{j0, std::min(j0 + kChain, mine.end)};
    int64_t d = add_pairs<kPairs>(weights, rows, columns, chain, 0, out);
    for (; d < columns; d += lanes<T>) {
      vec<T> sum{};
      for (int64_t j = chain.begin; j < chain.end; ++j)
        sum += broadcast(weights[j]) * load_n(rows.at(j, d).data, columns - d);
      store(out + d, load(out + d) + sum);
    }
  }
}

}  // namespace pykernels
