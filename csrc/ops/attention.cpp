// T. Dao, "FlashAttention-2" (2023), for caches instead of shared memory: scores exist for a few
// query rows by one block of keys, and the softmax is rescaled as the row maximum grows. The scale
// joins in where a score becomes a weight, 2^((score - top) * scale * log2(e)): rounded near zero,
// where scaling the queries beforehand would round at the size of a score.
#include "attention.h"

#include <array>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include <pybind11/stl.h>

#include "../bind.h"
#include "../core/gemm.h"
#include "../core/vec_math.h"

namespace pykernels {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Keys whose packed K and V a thread keeps in its second-level cache.
constexpr int64_t kKeyBlock = 512;
static_assert(kKeyBlock % kPanel<float> == 0 && kKeyBlock % kPanel<double> == 0);

// The longest sum that is one chain of additions: longer ones are made of several, for the error of
// a chain grows with its length. Each further chain costs one load and store of the tile.
constexpr int64_t kChain = 128;

// Query rows by keys of scores at a time, in the backward pass.
constexpr int64_t kBackwardRows = kVecRegisters == 32 ? 112 : 96;
constexpr int64_t kBackwardKeys = 128;

// Query rows whose scores are computed before their softmax: a tile or two, to stay near the first
// level of cache.
constexpr int64_t kScoreRows = kTileRows * (kVecRegisters == 32 ? 1 : 2);

// Rows of scores are this much longer than a block of keys, so that they do not share cache sets.
constexpr int64_t kRowPad = 16;

// Bytes of widened queries and of outputs that one thread keeps while all keys go past.
constexpr int64_t kQueryBytes = 1024 * 1024;

// The keys out of `keys` that any of some queries may see, counted from keys.begin; empty if none.
PK_INLINE Range visible_keys(const AttentionSizes& n, Range queries, Range keys) {
  const int64_t begin = std::max(keys.begin, queries.begin + n.first) - keys.begin;
  const int64_t end = std::min(keys.end, queries.end + n.last) - keys.begin;
  return begin < end ? Range{begin, end} : Range{0, 0};
}

// Whether the scale may wait until a score becomes a weight: -inf must stay -inf under it.
template <class T>
bool scale_waits(const AttentionSizes& n, const AttentionMask& mask, bool sinks) {
  return mask.kind != AttentionMask::kAdditive && n.softcap == 0 && !sinks &&
         T(n.scale) >= std::numeric_limits<T>::min();
}

// What one unit of the scores in memory is worth.
template <class T>
T score_unit(const AttentionSizes& n, const AttentionMask& mask, bool sinks) {
  return scale_waits<T>(n, mask, sinks) ? T(n.scale) : T(1);
}

// `part` of one row of products to capped scores, and `slopes`, where asked for, to what a score
// grows by as the scaled product does: tanh' = 1 - tanh^2, which is 4 e / (1 + e)^2 with
// e = exp(-2 |x|), where nothing cancels. In whole registers.
template <class T>
void cap_scores(const AttentionSizes& n, Range part, T* scores, T* slopes) {
  const T cap = T(n.softcap), rate = T(n.scale / n.softcap);
  for (int64_t j = part.begin / lanes<T> * lanes<T>; j < part.end; j += lanes<T>) {
    const vec<T> x = load(scores + j) * rate;
    store(scores + j, cap * tanh<T>(x));
    if (slopes) {
      const vec<T> e = exp<T>(-2 * max(x, -x));
      store(slopes + j, 4 * e / ((1 + e) * (1 + e)));
    }
  }
}

// Brings `part` of one row of products, of keys from `first` on, into the unit, masked; `slopes` as
// cap_scores has it.
template <class S, class T>
void finish_scores(const AttentionSizes& n, const AttentionMask& mask, bool sinks, int64_t b,
                   int64_t h, int64_t i, int64_t first, Range part, T* scores,
                   T* slopes = nullptr) {
  const int64_t start = b * mask.batch + h * mask.head + i * mask.row + first * mask.column;
  if (n.softcap > 0) cap_scores(n, part, scores, slopes);
  const T scale = n.softcap > 0 ? T(1) : static_cast<T>(n.scale);
  if (mask.kind == AttentionMask::kAdditive) {
    const S* const bias = static_cast<const S*>(mask.data) + start;
    for (int64_t j = part.begin; j < part.end; ++j)
      scores[j] = scores[j] * scale + widen(bias[j * mask.column]);
    return;
  }
  if (!scale_waits<T>(n, mask, sinks))
    for (int64_t j = part.begin; j < part.end; ++j) scores[j] *= scale;
  if (mask.kind == AttentionMask::kBoolean) {
    const uint8_t* const attend = static_cast<const uint8_t*>(mask.data) + start;
    for (int64_t j = part.begin; j < part.end; ++j)
      scores[j] = attend[j * mask.column] ? scores[j] : -kInfinity<T>;
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

// c [rows, panels] (+)= a b, with b packed in panels and c a multiple of a panel wide.
template <class T>
PK_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row,
                        int64_t a_step, const T* b, int64_t b_depth, bool accumulate, T* c,
                        int64_t c_row) {
  constexpr int64_t width = kPanel<T>;
  for_each_tile({0, rows}, {0, ceil_div(columns, width)},
                [&](int64_t row, int64_t count, int64_t panel, int64_t wide) {
                  multiply_tile(count, wide, depth, a + row * a_row, a_row, a_step,
                                b + panel * b_depth * width, b_depth * width, width, accumulate,
                                c + row * c_row + panel * width, c_row);
                });
}

// c = a b, with b packed in panels [depth, kPanel] and the sums made of several chains.
template <class T>
PK_INLINE void multiply_in_chains(int64_t rows, int64_t columns, int64_t depth, const T* a,
                                  const T* b, T* c, int64_t c_row) {
  for (int64_t k = 0; k < depth; k += kChain)
    multiply(rows, columns, std::min(kChain, depth - k), a + k, depth, 1, b + k * kPanel<T>, depth,
             k > 0, c, c_row);
}

// Rows [rows, columns], widened and contiguous, in whole registers: the next row covers what one
// writes past its end.
template <class T, class S>
void copy_rows(const S* from, int64_t from_row, int64_t rows, int64_t columns, T* to) {
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += columns)
    for (int64_t d = 0; d < columns; d += lanes<T>) store(to + d, load_n(from + d, columns - d));
}

template <class T, class S>
void pack_alone(View<S> from, int64_t depth, int64_t columns, T* to) {
  pack_panels<T>(Team{0, 1, nullptr}, from, depth, columns, to);
}

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

// ---- forward ------------------------------------------------------------------------------------

// One item is a chunk of queries of all heads that share one head of K and V: `group` heads by
// `chunk` queries, as rows in that order.
template <class S>
class Forward {
  using T = compute_t<S>;

 public:
  Forward(int threads, const AttentionForward<S>& p)
      : p_(p), n_(p.sizes), group_(std::max<int64_t>(1, n_.N / std::max<int64_t>(1, n_.N_kv))),
        out_width_(round_up(n_.D_v, kPanel<T>)), chunk_(choose_chunk(threads)),
        chunks_(ceil_div(n_.S_q, chunk_)), rows_(group_ * chunk_),
        per_thread_(Arena<T>::padded(rows_ * n_.D) + Arena<T>::padded(rows_ * out_width_) +
                    Arena<T>::padded(rows_) * 2 + Arena<T>::padded(kScoreRows) * 2 +
                    Arena<T>::padded(kKeyBlock * n_.D) + Arena<T>::padded(kKeyBlock * out_width_) +
                    Arena<T>::padded(kScoreRows * (kKeyBlock + kRowPad))),
        scratch_(threads * per_thread_) {}

  int64_t items() const { return n_.B * n_.N_kv * chunks_; }

  void run(const Team& team, int64_t item) const {
    Arena<T> arena(scratch_.get() + team.rank * per_thread_);
    T* const queries = arena.take(rows_ * n_.D);
    T* const out = arena.take(rows_ * out_width_);
    T* const maximum = arena.take(rows_);
    T* const sum = arena.take(rows_);
    T* const top = arena.take(kScoreRows);
    T* const factor = arena.take(kScoreRows);
    T* const packed_k = arena.take(kKeyBlock * n_.D);
    T* const packed_v = arena.take(kKeyBlock * out_width_);
    T* const scores = arena.take(kScoreRows * (kKeyBlock + kRowPad));
    constexpr int64_t score_row = kKeyBlock + kRowPad;
    const T unit = score_unit<T>(n_, p_.mask, p_.sinks), rate = unit * T(kLog2E);

    // The last chunks see the most keys in a causal mask: they go first.
    const int64_t b = item / n_.N_kv % n_.B, g = item % n_.N_kv;
    const int64_t i0 = (chunks_ - 1 - item / (n_.B * n_.N_kv)) * chunk_;
    const int64_t length = std::min(chunk_, n_.S_q - i0), rows = group_ * length;
    const auto head = [&](int64_t row) { return g * group_ + row / length; };
    const auto query = [&](int64_t row) { return i0 + row % length; };

    for (int64_t r = 0; r < rows; r += length)
      copy_rows(p_.q.at(b, head(r), i0), p_.q.row, length, n_.D, queries + r * n_.D);
    std::fill(out, out + rows * out_width_, T(0));
    // A sink is a key that every row has seen beforehand.
    for (int64_t r = 0; r < rows; ++r) {
      maximum[r] = p_.sinks ? T(widen(p_.sinks[head(r)])) : -kInfinity<T>;
      sum[r] = maximum[r] == -kInfinity<T> ? T(0) : T(1);
    }

    const Range all = visible_keys(n_, {i0, i0 + length}, {0, n_.S_k});
    for (int64_t j0 = all.begin; j0 < all.end; j0 += kKeyBlock) {
      const int64_t keys = std::min(kKeyBlock, all.end - j0);
      pack_alone<T>(View<S>{p_.k.at(b, g, j0), 1, p_.k.row}, n_.D, keys, packed_k);
      pack_alone<T>(View<S>{p_.v.at(b, g, j0), p_.v.row, 1}, keys, n_.D_v, packed_v);
      for (int64_t r0 = 0; r0 < rows; r0 += kScoreRows) {
        const int64_t count = std::min(kScoreRows, rows - r0);
        Range mine[kScoreRows];  // keys of this block that a row sees
        Range seen{keys, 0};     // and that any of these rows sees
        for (int64_t r = 0; r < count; ++r) {
          const int64_t i = query(r0 + r);
          mine[r] = visible_keys(n_, {i, i + 1}, {j0, j0 + keys});
          if (mine[r].size() == 0) continue;
          seen = {std::min(seen.begin, mine[r].begin), std::max(seen.end, mine[r].end)};
        }
        if (seen.size() <= 0) continue;
        seen.begin -= seen.begin % kPanel<T>;
        multiply_in_chains(count, seen.size(), n_.D, queries + r0 * n_.D,
                           packed_k + seen.begin * n_.D, scores, score_row);
        for (int64_t r = 0; r < count; ++r) {
          T* const row = scores + r * score_row;
          // From here on a row begins at the first key that any row sees.
          mine[r] = mine[r].size() == 0
                        ? Range{0, 0}
                        : Range{mine[r].begin - seen.begin, mine[r].end - seen.begin};
          finish_scores<S>(n_, p_.mask, p_.sinks, b, head(r0 + r), query(r0 + r), j0 + seen.begin,
                           mine[r], row);
          std::fill(row, row + mine[r].begin, -kInfinity<T>);
          top[r] = row_maximum(row, mine[r].end, maximum[r0 + r]);
        }
        // exp2(-inf - -inf) is NaN, where a row has seen no key so far: then there is nothing to
        // scale.
        for (int64_t r = 0; r < count; r += lanes<T>) {
          const vec<T> before = load(maximum + r0 + r), now = load(top + r);
          store(factor + r, select<vec<T>>(before == now, 1 + vec<T>{},
                                           exp2_softmax<T>((before - now) * rate)));
        }
        for (int64_t r = 0; r < count; ++r) {
          if (factor[r] != 1) scale_row(out + (r0 + r) * out_width_, out_width_, factor[r]);
          sum[r0 + r] = sum[r0 + r] * factor[r] +
                        weigh(scores + r * score_row, mine[r].end, seen.size(), top[r], rate);
          maximum[r0 + r] = top[r];
        }
        multiply(count, n_.D_v, seen.size(), scores, score_row, 1,
                 packed_v + seen.begin * kPanel<T>, keys, true, out + r0 * out_width_, out_width_);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (b * n_.N + head(r)) * n_.S_q + query(r);
      const T* const from = out + r * out_width_;
      const T inverse = sum[r] > 0 || sum[r] != sum[r] ? 1 / sum[r] : T(0);
      for (int64_t d = 0; d < n_.D_v; d += lanes<T>)
        store_n(p_.out + at * n_.D_v + d, load(from + d) * inverse, n_.D_v - d);
      p_.lse[at] = maximum[r] * unit + std::log(sum[r]);
      p_.rows.top[at] = maximum[r] == -kInfinity<T> ? kInfinity<T> : maximum[r];
      p_.rows.inverse[at] = inverse;
    }
  }

 private:
  // As many queries as fit in the cache, unless that leaves threads idle.
  int64_t choose_chunk(int threads) const {
    const int64_t fit = kQueryBytes / (group_ * (n_.D + out_width_) * int64_t(sizeof(T)));
    const int64_t heads = n_.B * n_.N_kv;
    const int64_t pieces = heads ? ceil_div(threads > 1 ? 4 * threads : 1, heads) : 1;
    return std::max<int64_t>(1, std::min({round_up(std::max<int64_t>(fit, 1), kScoreRows),
                                          round_up(ceil_div(n_.S_q, pieces), kScoreRows), n_.S_q}));
  }

  // The largest of `most` and scores[0, count), and the rest of the last register at -inf.
  static T row_maximum(T* scores, int64_t count, T most) {
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
  static T weigh(T* scores, int64_t count, int64_t seen, T top, T rate) {
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

  const AttentionForward<S>& p_;
  const AttentionSizes& n_;
  const int64_t group_, out_width_, chunk_, chunks_, rows_, per_thread_;
  const Scratch<T> scratch_;
};

// ---- backward -----------------------------------------------------------------------------------

// With P the weights and delta_i = out_i . dout_i - dlse_i, one number a query:
//
//   dV = P^T dout      dP = dout V^T      dS = P * (dP - delta)      dQ = dS K      dK = dS^T Q
//
// where dQ and dK take the scale. An item is one head of K and V, or every `splits`-th block of its
// keys where there are fewer heads than threads; each split adds to a dQ of its own, and these are
// summed in order at the end. All that adds to one element of the mask's gradient is one item:
// where sequences or heads share a mask, the item goes through them all.
template <class S>
class Backward {
  using T = compute_t<S>;

 public:
  Backward(int threads, const AttentionBackward<S>& p)
      : p_(p), n_(p.sizes), group_(n_.N / std::max<int64_t>(1, n_.N_kv)),
        batches_(p.dmask.data && p.dmask.batch == 0 ? n_.B : 1),
        heads_(p.dmask.data && p.dmask.head == 0 ? n_.N_kv : 1), width_(round_up(n_.D, kPanel<T>)),
        v_width_(round_up(n_.D_v, kPanel<T>)), splits_(choose_splits(threads)),
        dq_size_(n_.B * n_.N * n_.S_q * width_),
        in_place_(std::is_same_v<S, T> && splits_ == 1 && width_ == n_.D),
        per_thread_(
            Arena<T>::padded(kBackwardKeys * n_.D) + Arena<T>::padded(kBackwardKeys * n_.D_v) +
            Arena<T>::padded(kBackwardKeys * width_) * 2 +
            Arena<T>::padded(kBackwardKeys * v_width_) + Arena<T>::padded(kBackwardRows * n_.D) +
            Arena<T>::padded(kBackwardRows * n_.D_v) + Arena<T>::padded(kBackwardRows * width_) +
            Arena<T>::padded(kBackwardRows * v_width_) +
            Arena<T>::padded(kBackwardRows * kTileLine) * 2),
        scratch_(threads * per_thread_), delta_(n_.B * n_.N * n_.S_q),
        dq_scratch_(p.dq && !in_place_ ? splits_ * dq_size_ : 0),
        dq_(in_place_ ? reinterpret_cast<T*>(p.dq) : dq_scratch_.get()) {}

  int64_t items() const { return groups() * splits_; }

  // Before any item: this thread's share of delta, and of a cleared dQ.
  void prepare(const Team& team) const {
    const Range rows = team.share(n_.B * n_.N * n_.S_q);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const S* const dout = p_.dout.at(r / n_.S_q / n_.N, r / n_.S_q % n_.N, r % n_.S_q);
      const S* const out = p_.out + r * n_.D_v;
      vec<T> sum{};
      for (int64_t d = 0; d < n_.D_v; d += lanes<T>)
        sum += load_n(dout + d, n_.D_v - d) * load_n(out + d, n_.D_v - d);
      delta_.get()[r] = reduce_add(sum) - (p_.dlse ? p_.dlse[r] : 0);
    }
    if (!p_.dq) return;
    const Range all = team.share(splits_ * dq_size_, lanes<T>);
    std::fill(dq_ + all.begin, dq_ + all.end, T(0));
  }

  void run(const Team& team, int64_t item) const {
    Arena<T> arena(scratch_.get() + team.rank * per_thread_);
    Tile tile;
    tile.keys_t = arena.take(kBackwardKeys * n_.D);
    tile.values_t = arena.take(kBackwardKeys * n_.D_v);
    tile.keys_scaled = arena.take(kBackwardKeys * width_);
    tile.dk = arena.take(kBackwardKeys * width_);
    tile.dv = arena.take(kBackwardKeys * v_width_);
    Rows rows;
    rows.queries = arena.take(kBackwardRows * n_.D);
    rows.douts = arena.take(kBackwardRows * n_.D_v);
    rows.query_panels = arena.take(kBackwardRows * width_);
    rows.dout_panels = arena.take(kBackwardRows * v_width_);
    rows.weights = arena.take(kBackwardRows * kTileLine);
    rows.dscores = arena.take(kBackwardRows * kTileLine);

    const int64_t wide = std::max<int64_t>(1, n_.N_kv / heads_);  // items over the heads
    const int64_t b0 = item / splits_ / wide * batches_, g0 = item / splits_ % wide * heads_;
    for (int64_t b = b0; b < b0 + batches_; ++b)
      for (int64_t g = g0; g < g0 + heads_; ++g) run_head(b, g, item % splits_, tile, rows);
  }

  // After all items: this thread's share of the sinks, and of dQ, the splits added in order.
  void finish(const Team& team) const {
    if (p_.dsinks) {
      const Range all = team.share(n_.N);
      for (int64_t h = all.begin; h < all.end; ++h) narrow(sink_gradient(h), p_.dsinks + h);
    }
    if (!p_.dq || in_place_) return;
    const Range rows = team.share(n_.B * n_.N * n_.S_q);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t d = 0; d < n_.D; d += lanes<T>) {
        vec<T> sum = load(dq_ + r * width_ + d);
        for (int64_t s = 1; s < splits_; ++s) sum += load(dq_ + s * dq_size_ + r * width_ + d);
        store_n(p_.dq + r * n_.D + d, sum, n_.D - d);
      }
    }
  }

 private:
  // Values from one row of scores to the next.
  static constexpr int64_t kTileLine = kBackwardKeys + kRowPad;

  // What a block of keys is packed into, and its gradients.
  struct Tile {
    T *keys_t, *values_t;  // K^T and V^T
    T *keys_scaled, *dk, *dv;
  };

  // What a block of queries is packed into, and the two matrices of its scores.
  struct Rows {
    T *queries, *douts;             // rows
    T *query_panels, *dout_panels;  // panels
    T *weights, *dscores;           // [rows, kTileLine]: P and dS
  };

  // A sink's value is 0, so that its score gets P * (0 - delta) from each query.
  T sink_gradient(int64_t h) const {
    const T sink = T(widen(p_.sinks[h]));
    T sum = 0;
    for (int64_t b = 0; b < n_.B; ++b) {
      T part = 0;  // of this sequence: shorter chains of additions
      for (int64_t i = 0; i < n_.S_q; ++i) {
        const int64_t at = (b * n_.N + h) * n_.S_q + i;
        part -= std::exp(sink - p_.rows.top[at]) * p_.rows.inverse[at] * delta_.get()[at];
      }
      sum += part;
    }
    return sum;
  }

  // The heads of K and V, or the sets of them that share a mask.
  int64_t groups() const { return n_.B * n_.N_kv / std::max<int64_t>(1, batches_ * heads_); }

  int64_t choose_splits(int threads) const {
    const int64_t heads = std::max<int64_t>(1, groups());
    const int64_t blocks = std::max<int64_t>(1, ceil_div(n_.S_k, kBackwardKeys));
    return heads >= 2 * threads || heads % threads == 0 ? 1 : std::min<int64_t>(threads, blocks);
  }

  // The share of `split` in the gradients of one head of K and V.
  void run_head(int64_t b, int64_t g, int64_t split, const Tile& tile, const Rows& rows) const {
    for (int64_t j0 = split * kBackwardKeys; j0 < n_.S_k; j0 += splits_ * kBackwardKeys) {
      const int64_t keys = std::min(kBackwardKeys, n_.S_k - j0);
      const S* const k = p_.k.at(b, g, j0);
      pack_alone<T>(View<S>{k, 1, p_.k.row}, n_.D, keys, tile.keys_t);
      pack_alone<T>(View<S>{p_.v.at(b, g, j0), 1, p_.v.row}, n_.D_v, keys, tile.values_t);
      pack_alone<T>(View<S>{k, p_.k.row, 1}, keys, n_.D, tile.keys_scaled);
      scale_row(tile.keys_scaled, keys * width_, T(n_.scale));
      std::fill(tile.dk, tile.dk + keys * width_, T(0));
      std::fill(tile.dv, tile.dv + keys * v_width_, T(0));
      for (int64_t h = g * group_; h < (g + 1) * group_; ++h) {
        // The queries that see any of these keys.
        const int64_t end = std::min(n_.S_q, j0 + keys - n_.first);
        for (int64_t i0 = std::max<int64_t>(0, j0 - n_.last); i0 < end; i0 += kBackwardRows) {
          const int64_t count = std::min(kBackwardRows, end - i0);
          Range seen = visible_keys(n_, {i0, i0 + count}, {j0, j0 + keys});
          seen.begin -= seen.begin % kPanel<T>;
          weights(b, h, i0, count, j0, seen, tile.keys_t, tile.values_t, rows);
          if (p_.dv)
            multiply(seen.size(), n_.D_v, count, rows.weights, 1, kTileLine, rows.dout_panels,
                     count, true, tile.dv + seen.begin * v_width_, v_width_);
          if (p_.dk)
            multiply(seen.size(), n_.D, count, rows.dscores, 1, kTileLine, rows.query_panels, count,
                     true, tile.dk + seen.begin * width_, width_);
          if (p_.dq)
            multiply(count, n_.D, seen.size(), rows.dscores, kTileLine, 1,
                     tile.keys_scaled + seen.begin * kPanel<T>, keys, true,
                     dq_ + split * dq_size_ + ((b * n_.N + h) * n_.S_q + i0) * width_, width_);
        }
      }
      const int64_t at = (b * n_.N_kv + g) * n_.S_k + j0;
      if (p_.dk) write(tile.dk, keys, n_.D, width_, T(n_.scale), p_.dk + at * n_.D);
      if (p_.dv) write(tile.dv, keys, n_.D_v, v_width_, T(1), p_.dv + at * n_.D_v);
    }
  }

  // P and dS of queries [i0, i0 + count) by the keys j0 + `seen`.
  void weights(int64_t b, int64_t h, int64_t i0, int64_t count, int64_t j0, Range seen,
               const T* keys_t, const T* values_t, const Rows& rows) const {
    const View<S> q{p_.q.at(b, h, i0), p_.q.row, 1};
    const View<S> dout{p_.dout.at(b, h, i0), p_.dout.row, 1};
    copy_rows(q.data, q.row, count, n_.D, rows.queries);
    copy_rows(dout.data, dout.row, count, n_.D_v, rows.douts);
    pack_alone<T>(q, count, n_.D, rows.query_panels);
    pack_alone<T>(dout, count, n_.D_v, rows.dout_panels);
    multiply_in_chains(count, seen.size(), n_.D, rows.queries, keys_t + seen.begin * n_.D,
                       rows.weights, kTileLine);
    multiply_in_chains(count, seen.size(), n_.D_v, rows.douts, values_t + seen.begin * n_.D_v,
                       rows.dscores, kTileLine);
    const T rate = score_unit<T>(n_, p_.mask, p_.sinks) * T(kLog2E);
    for (int64_t r = 0; r < count; ++r) {
      T* const weight = rows.weights + r * kTileLine;
      T* const dscore = rows.dscores + r * kTileLine;
      const int64_t first = j0 + seen.begin, i = i0 + r;
      const Range mine = visible_keys(n_, {i, i + 1}, {first, first + seen.size()});
      alignas(kCacheLine) T slopes[kTileLine];
      finish_scores<S>(n_, p_.mask, p_.sinks, b, h, i, first, mine, weight, slopes);
      std::fill(weight, weight + mine.begin, -kInfinity<T>);
      const int64_t at = (b * n_.N + h) * n_.S_q + i;
      const vec<T> top = broadcast(p_.rows.top[at]), inverse = broadcast(p_.rows.inverse[at]);
      const vec<T> delta = broadcast(delta_.get()[at]);
      for (int64_t j = 0; j < mine.end; j += lanes<T>) {
        const vec<T> p = exp2_softmax<T>((load(weight + j) - top) * rate) * inverse;
        store(weight + j, p);
        store(dscore + j, p * (load(dscore + j) - delta));
      }
      if (p_.dmask.data) {
        T* const to = p_.dmask.at(b, h, i) + first;
        for (int64_t j = mine.begin; j < mine.end; ++j) to[j] += dscore[j];
      }
      if (n_.softcap > 0)
        for (int64_t j = mine.begin / lanes<T> * lanes<T>; j < mine.end; j += lanes<T>)
          store(dscore + j, load(dscore + j) * load(slopes + j));
      // What an unseen key has may be NaN.
      std::fill(dscore, dscore + mine.begin, T(0));
      fill(weight, mine.end, seen.size(), T(0));
      fill(dscore, mine.end, seen.size(), T(0));
    }
  }

  static void write(const T* from, int64_t rows, int64_t columns, int64_t from_row, T factor,
                    S* to) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < columns; d += lanes<T>)
        store_n(to + i * columns + d, load(from + i * from_row + d) * factor, columns - d);
  }

  const AttentionBackward<S>& p_;
  const AttentionSizes& n_;
  const int64_t group_;
  const int64_t batches_, heads_;  // sequences and heads of K and V that one item goes through
  const int64_t width_, v_width_, splits_, dq_size_;
  const bool in_place_;  // dQ is summed where it is wanted
  const int64_t per_thread_;
  const Scratch<T> scratch_, delta_, dq_scratch_;
  T* const dq_;  // [splits, B, N, S_q, width]
};

}  // namespace

template <class S>
void attention_forward(int threads, const AttentionForward<S>& p) {
  const Forward<S> forward(threads, p);
  Items items(forward.items());
  parallel(static_cast<int>(std::min<int64_t>(threads, forward.items())), [&](const Team& team) {
    for (int64_t item; items.take(&item);) forward.run(team, item);
  });
}

template <class S>
void attention_backward(int threads, const AttentionBackward<S>& p) {
  const Backward<S> backward(threads, p);
  Items items(backward.items());
  parallel(threads, [&](const Team& team) {
    backward.prepare(team);
    team.wait();
    for (int64_t item; items.take(&item);) backward.run(team, item);
    team.wait();
    backward.finish(team);
  });
}

namespace {

using Sizes = std::array<int64_t, 7>;  // B, N, N_kv, S_q, S_k, D, D_v
using Band = std::array<int64_t, 2>;   // the first and last j - i that is seen
using Scores = std::array<double, 2>;  // the scale and the softcap
using Strided = std::pair<Address, std::array<int64_t, 3>>;
using StridedMask = std::tuple<int, Address, std::array<int64_t, 4>>;

AttentionSizes sizes(const Sizes& n, const Band& band, const Scores& scores) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], band[0], band[1], scores[0], scores[1]};
}

template <class S>
Heads<S> heads(const Strided& rows) {
  const auto& [data, strides] = rows;
  return {pointer<S>(data), strides[0], strides[1], strides[2]};
}

// From [2, B, N, S_q].
template <class T>
AttentionRows<T> rows_of(T* data, const Sizes& n) {
  return {data, data + n[0] * n[1] * n[3]};
}

AttentionMask mask_of(const StridedMask& rows) {
  const auto& [kind, data, strides] = rows;
  return {static_cast<AttentionMask::Kind>(kind),
          pointer<const void>(data),
          strides[0],
          strides[1],
          strides[2],
          strides[3]};
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward",
        [](int dtype, int threads, const Sizes& n, const Band& band, const Scores& scores,
           const std::array<Strided, 3>& qkv, const StridedMask& mask, Address sinks, Address out,
           Address lse, Address rows) {
          dispatch(dtype, [&](auto tag) {
            using S = typename decltype(tag)::type;
            using T = compute_t<S>;
            attention_forward<S>(
                threads, {sizes(n, band, scores), heads<const S>(qkv[0]), heads<const S>(qkv[1]),
                          heads<const S>(qkv[2]), mask_of(mask), pointer<const S>(sinks),
                          pointer<S>(out), pointer<T>(lse), rows_of(pointer<T>(rows), n)});
          });
        });
  m.def("attention_backward",
        [](int dtype, int threads, const Sizes& n, const Band& band, const Scores& scores,
           const std::array<Strided, 4>& in, const StridedMask& mask, Address sinks,
           const std::array<Address, 3>& of_rows, const std::array<Address, 3>& grads,
           const Strided& dmask, Address dsinks) {
          dispatch(dtype, [&](auto tag) {
            using S = typename decltype(tag)::type;
            using T = compute_t<S>;
            attention_backward<S>(
                threads,
                {sizes(n, band, scores), heads<const S>(in[0]), heads<const S>(in[1]),
                 heads<const S>(in[2]), mask_of(mask), pointer<const S>(sinks),
                 pointer<S>(of_rows[0]), rows_of(pointer<const T>(of_rows[1]), n),
                 heads<const S>(in[3]), pointer<T>(of_rows[2]), pointer<S>(grads[0]),
                 pointer<S>(grads[1]), pointer<S>(grads[2]), heads<T>(dmask), pointer<S>(dsinks)});
          });
        });
}

}  // namespace pykernels
