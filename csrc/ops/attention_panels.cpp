// Attention of queries that fill panels: scores exist for a panel of queries by a block of keys,
// and lie keys by queries. What a softmax takes over keys is then a lane's own, keys are the rows
// that broadcast, and weights are the packed panel that the second product reads.
#include <type_traits>

#include "attention_tiles.h"

namespace pykernels {
namespace {

// Keys by which a panel of scores takes 12 KB at most, a part of the first level of cache. Outputs
// and sums of weights are chains of as many additions, a few more than kChain: each block costs
// their loads and stores.
constexpr int64_t kKeyBlock = std::min(192, 12 * 1024 / (kPanelVecs * kVecBytes));

// Bytes of widened queries and of outputs that one thread keeps while all keys go past.
constexpr int64_t kQueryBytes = 1024 * 1024;

// Scores that stay within this many powers of two need no maximum: their weights can neither
// overflow nor vanish in a sum.
constexpr double kBound = 40;

// Powers of two by which a score may exceed the level that weights are measured from.
constexpr int kHeadroom = 4;

// Queries by heads that no item is cut shorter than, lest the packing of its values show.
constexpr int64_t kFewestRows = 256;

// One item is a chunk of queries of all heads that share one head of K and V: `group` heads by
// these queries, as rows in that order, cut into panels.
template <class S>
class Panels {
  using T = compute_t<S>;
  static constexpr int64_t kWidth = kPanel<T>;
  static constexpr int64_t kTurnedRow = kKeyBlock + kRowPad;

 public:
  Panels(int threads, const AttentionForward<S>& p)
      : p_(p), n_(p.sizes), group_(std::max<int64_t>(1, n_.N / std::max<int64_t>(1, n_.N_kv))),
        chunks_(cut(threads)), rows_(round_up(group_ * longest_chunk(), kWidth)),
        widest_(std::max(n_.D, n_.D_v)),
        per_thread_(Arena<T>::padded(rows_ * n_.D) + Arena<T>::padded(rows_ * n_.D_v) +
                    Arena<T>::padded(rows_) * 2 + Arena<T>::padded(kKeyBlock * n_.D) +
                    Arena<T>::padded(kKeyBlock * n_.D_v) +
                    Arena<T>::padded((kKeyBlock + 1) * kWidth) +
                    Arena<T>::padded(kWidth * std::max(kTurnedRow, widest_ + lanes<T>))),
        scratch_(threads * per_thread_), gathered_(threads * gathered_rows()) {}

  int64_t items() const { return chunks_.size(); }

  void run(const Team& team, int64_t item) const {
    Arena<T> arena(scratch_.get() + team.rank * per_thread_);
    T* const queries = arena.take(rows_ * n_.D);  // [panel][D, kWidth]
    T* const out = arena.take(rows_ * n_.D_v);    // [panel][D_v, kWidth]
    T* const level = arena.take(rows_);
    T* const sum = arena.take(rows_);
    T* const keys = arena.take(kKeyBlock * n_.D);            // [keys, D]
    T* const values = arena.take(kKeyBlock * n_.D_v);        // V^T, packed in tiles of its rows
    T* const scores = arena.take((kKeyBlock + 1) * kWidth);  // [keys, kWidth]
    T* const turned = arena.take(kWidth * std::max(kTurnedRow, widest_ + lanes<T>));
    S* const gathered = gathered_.get() + team.rank * gathered_rows();
    const T unit = score_unit(n_, p_.rule);
    const bool ruled = !scale_waits(n_, p_.rule) || p_.rule.mask.kind != AttentionMask::kNone;

    Ahead ahead;
    const Chunk chunk = chunks_[item];
    const int64_t b = chunk.head / n_.N_kv, g = chunk.head % n_.N_kv, i0 = chunk.queries.begin;
    const AttentionSizes n = sequence(n_, p_.packing, b);
    const int64_t length = std::min(chunk.queries.end, n.S_q) - i0, rows = group_ * length;
    if (length <= 0) return;
    // Runs body(r, h, i) for the rows of the panel at r0: counted from there, head h, query i.
    const auto for_rows = [&](int64_t r0, const auto& body) {
      int64_t h = g * group_ + r0 / length, i = i0 + r0 % length;
      for (int64_t r = 0; r < std::min(kWidth, rows - r0); ++r) {
        body(r, h, i);
        if (++i == i0 + length) ++h, i = i0;
      }
    };

    const Range all = visible_keys(n, {i0, i0 + length}, {0, n.S_k});
    const T log_rate = unit * T(kLog2E);
    // The first values; those of later blocks are asked for during the block before. Pages are
    // copied row by row.
    if (!p_.pages.table)
      fetch_rows(p_.v.at(b, g, all.begin), p_.v.row, std::min(kKeyBlock, all.size()), n_.D_v);
    // Measured from 0, an only key's weight times the inverse of their sum need not be 1.
    const bool alone = std::min(n.S_k, n.last - n.first + 1) == 1;
    const bool bounded =
        !ruled && !alone && are_bounded(b, g, {i0, i0 + length}, all, log_rate, gathered);
    const T rate = bounded ? T(1) : log_rate;  // packed queries hold it already

    std::fill(out, out + round_up(rows, kWidth) * n_.D_v, T(0));
    std::fill(level, level + round_up(rows, kWidth), bounded ? T(0) : -kInfinity<T>);
    std::fill(sum, sum + round_up(rows, kWidth), T(0));
    for (int64_t r0 = 0; r0 < rows; r0 += kWidth) {
      T* const panel = queries + r0 * n_.D;
      const int64_t count = std::min(kWidth, rows - r0), i = i0 + r0 % length;
      if (i + count <= i0 + length) {
        pack_panel(View<S>{p_.q.at(b, g * group_ + r0 / length, i), 1, p_.q.row}, n_.D, count,
                   panel);
      } else {  // of several heads
        for_rows(r0, [&](int64_t r, int64_t h, int64_t i) {
          copy_rows(p_.q.at(b, h, i), 0, 1, n_.D, turned + r * n_.D);
        });
        pack_panel(View<T>{turned, 1, n_.D}, n_.D, count, panel);
      }
      if (bounded) scale_row(panel, kWidth * n_.D, log_rate);
      if (!p_.rule.sinks) continue;
      // A sink is a key that every row has seen beforehand.
      for_rows(r0, [&](int64_t r, int64_t h, int64_t) {
        level[r0 + r] = widen(p_.rule.sinks[h]);
        sum[r0 + r] = level[r0 + r] == -kInfinity<T> ? T(0) : T(1);
      });
    }

    for (int64_t j0 = all.begin; j0 < all.end; j0 += kKeyBlock) {
      const int64_t block = std::min(kKeyBlock, all.end - j0);
      const View<S> k = rows_of(p_.k, p_.pages, b, g, j0, block, n_.D, gathered);
      // Those of pages lie where values will be next.
      const T* const key_rows =
          p_.pages.table ? copied(k, block, n_.D, keys) : widened(k, block, n_.D, keys);
      const View<S> v = rows_of(p_.v, p_.pages, b, g, j0, block, n_.D_v, gathered);
      pack_rows<T>(v.transposed(), n_.D_v, block, values);
      look_ahead(b, g, {j0 + block, all.end}, {i0, i0 + length}, item + team.size, &ahead);
      ahead.divide(4 * ceil_div(rows, kWidth));
      for (int64_t r0 = 0; r0 < rows; r0 += kWidth) {
        // The queries of this panel: of one head, or of parts of several.
        const int64_t i = i0 + r0 % length, end = i + std::min(kWidth, rows - r0);
        const Range some = end <= i0 + length ? Range{i, end} : Range{i0, i0 + length};
        const Range seen = visible_keys(n, some, {j0, j0 + block});
        if (seen.size() == 0) continue;
        const Range part{j0 + seen.begin, j0 + seen.end};
        const Panel panel{queries + r0 * n_.D, scores, out + r0 * n_.D_v, level + r0, sum + r0};
        const bool whole = all_visible(n, some, part);
        ahead.ask();
        score(key_rows + seen.begin * n_.D, seen.size(), panel.queries, scores);
        if (ruled) {
          // Rules are about rows: they get them.
          turn(scores, seen.size(), turned, kTurnedRow);
          for_rows(r0, [&](int64_t r, int64_t h, int64_t i) {
            finish_scores(n, p_.rule, b, h, i, part.begin, visible_keys(n, {i, i + 1}, part),
                          turned + r * kTurnedRow);
          });
          transpose_copy<T, kPanelVecs>(turned, kTurnedRow, kWidth, seen.size(), scores, kWidth);
        }
        if (!whole)
          for_rows(r0, [&](int64_t r, int64_t, int64_t i) {
            const Range mine = visible_keys(n, {i, i + 1}, part);
            for (int64_t j = 0; j < mine.begin; ++j) scores[j * kWidth + r] = -kInfinity<T>;
            for (int64_t j = mine.end; j < seen.size(); ++j) scores[j * kWidth + r] = -kInfinity<T>;
          });
        ahead.ask();
        weigh(seen.size(), rate, bounded, whole, panel);
        ahead.ask();
        if (p_.rule.dropout > 0)
          for_rows(r0, [&](int64_t r, int64_t h, int64_t i) {
            const Range mine = visible_keys(n, {i, i + 1}, part);
            draw_kept(p_.rule, b * n_.N + h, i, part.begin, mine, turned);
            for (int64_t j = mine.begin; j < mine.end; ++j) scores[j * kWidth + r] *= turned[j];
          });
        for_each_tile_height(n_.D_v, [&](int64_t d, int64_t tiles, int64_t height) {
          multiply_tile(height, 1, seen.size(), values + d * block + seen.begin * height, 1, height,
                        scores, 0, kWidth, true, panel.out + d * kWidth, kWidth, tiles,
                        height * block);
        });
        ahead.ask();
      }
    }
    for (int64_t r0 = 0; r0 < rows; r0 += kWidth) {
      const int64_t line = round_up(n_.D_v, lanes<T>);
      turn(out + r0 * n_.D_v, n_.D_v, turned, line);
      for_rows(r0, [&](int64_t r, int64_t h, int64_t i) {
        const T top = level[r0 + r], total = sum[r0 + r];
        const T inverse = total > 0 || total != total ? 1 / total : T(0);
        S* const to = p_.out.at(b, h, i);
        for (int64_t d = 0; d < n_.D_v; d += lanes<T>)
          store_n(to + d, load(turned + r * line + d) * inverse, n_.D_v - d);
        const int64_t at = row_of(n_, p_.packing, b, h, i);
        if (p_.lse) p_.lse[at] = top * unit + std::log(total);
        if (!p_.rows.top) return;
        p_.rows.top[at] = top == -kInfinity<T> ? kInfinity<T> : top;
        p_.rows.inverse[at] = inverse;
      });
    }
  }

 private:
  struct Chunk {
    int64_t head;  // of K and V, of all sequences
    Range queries;
  };

  // A panel of queries, and what has come of it so far.
  struct Panel {
    const T* queries;  // [D, kWidth]
    T* scores;         // [keys, kWidth], of one block
    T* out;            // [D_v, kWidth]
    T *level, *sum;    // [kWidth]
  };

  // What is wanted after a block of keys: those that are `left`, or else the start of item `next`
  // and the outputs of `queries`. Threads take items in turn, which makes it likely this one's
  // next.
  void look_ahead(int64_t b, int64_t g, Range left, Range queries, int64_t next,
                  Ahead* ahead) const {
    ahead->clear();
    if (left.size() > 0) return add_keys(b, g, left, ahead);
    if (next < items()) add_item(chunks_[next], ahead);
    for (int64_t h = g * group_; h < (g + 1) * group_; ++h)
      ahead->add(p_.out.at(b, h, queries.begin), p_.out.row, queries.size(), n_.D_v);
  }

  void add_item(const Chunk& chunk, Ahead* ahead) const {
    const int64_t b = chunk.head / n_.N_kv, g = chunk.head % n_.N_kv, i = chunk.queries.begin;
    const AttentionSizes n = sequence(n_, p_.packing, b);
    const int64_t end = std::min(chunk.queries.end, n.S_q);
    if (i >= end) return;
    ahead->add(p_.q.at(b, g * group_, i), p_.q.row, std::min(kKeyBlock, end - i), n_.D);
    add_keys(b, g, visible_keys(n, {i, end}, {0, n.S_k}), ahead);
  }

  // The first block of `keys`, where they lie one behind the other.
  void add_keys(int64_t b, int64_t g, Range keys, Ahead* ahead) const {
    if (p_.pages.table) return;
    const int64_t count = std::min(kKeyBlock, keys.size());
    ahead->add(p_.k.at(b, g, keys.begin), p_.k.row, count, n_.D);
    ahead->add(p_.v.at(b, g, keys.begin), p_.v.row, count, n_.D_v);
  }

  // scores [count, kWidth] = the products of keys [count, D] with a panel of queries [D, kWidth].
  void score(const T* keys, int64_t count, const T* queries, T* scores) const {
    for_each_tile_height(count, [&](int64_t j, int64_t tiles, int64_t height) {
      for (int64_t d = 0; d < n_.D; d += kChain)
        multiply_tile(height, 1, std::min(kChain, n_.D - d), keys + j * n_.D + d, n_.D, 1,
                      queries + d * kWidth, 0, kWidth, d > 0, scores + j * kWidth, kWidth, tiles,
                      height * n_.D);
    });
  }

  // Whether the products of these queries with these keys, times the rate, are all within kBound:
  // one is no longer than the lengths of its vectors.
  bool are_bounded(int64_t b, int64_t g, Range queries, Range keys, T rate, S* gathered) const {
    T query = 0, key = 0;
    for (int64_t h = g * group_; h < (g + 1) * group_; ++h)
      lengthen(&query, {p_.q.at(b, h, queries.begin), p_.q.row, 1}, queries.size());
    for (int64_t j0 = keys.begin; j0 < keys.end; j0 += kKeyBlock) {
      const int64_t block = std::min(kKeyBlock, keys.end - j0);
      lengthen(&key, rows_of(p_.k, p_.pages, b, g, j0, block, n_.D, gathered), block);
    }
    return query * key * rate * rate < T(kBound * kBound);
  }

  // *most becomes the largest |row|^2 of [count, D] if that is larger, and NaN if one is NaN.
  void lengthen(T* most, View<S> rows, int64_t count) const {
    vec<T> longest = broadcast(*most), nothing{};  // or NaN
    for (int64_t r = 0; r < count; r += lanes<T>) {
      vec<T> squares[lanes<T>];  // past the last row, the last one again
#pragma GCC unroll 16
      for (int i = 0; i < lanes<T>; ++i) {
        const S* const row = rows.data + std::min(r + i, count - 1) * rows.row;
        squares[i] = vec<T>{};
        int64_t d = 0;
        for (; d + lanes<T> <= n_.D; d += lanes<T>) {
          const vec<T> x = load(row + d);
          squares[i] += x * x;
        }
        if (d < n_.D) {
          const vec<T> x = load_n(row + d, n_.D - d);
          squares[i] += x * x;
        }
      }
      const vec<T> sums = sum_of_each(squares);
      longest = max(sums, longest);
      nothing += sums - sums;  // of infinity too, which is no bound either
    }
    *most = reduce_max(longest) + reduce_add(nothing);
  }

  // to[c * to_row + r] = from[r * kWidth + c], in whole registers of rows.
  static void turn(const T* from, int64_t rows, T* to, int64_t to_row) {
    for (int64_t r = 0; r < rows; r += lanes<T>)
      for (int64_t c = 0; c < kWidth; c += lanes<T>) {
        vec<T> square[lanes<T>];  // past the last row, the last one again
#pragma GCC unroll 16
        for (int i = 0; i < lanes<T>; ++i)
          square[i] = load(from + std::min(r + i, rows - 1) * kWidth + c);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes<T>; ++i) store(to + (c + i) * to_row + r, square[i]);
      }
  }

  // A panel's scores [count, kWidth] to weights 2^((score - level) rate). Where all scores are
  // `bounded`, the level is 0 and the rate 1; else the level is near the largest so far: it follows
  // only where a weight would exceed 2^kHeadroom, since all weights so far then have to follow too.
  void weigh(int64_t count, T rate, bool bounded, bool whole, const Panel& panel) const {
    constexpr int n = kPanelVecs;
    if (!bounded) follow(count, rate, panel);
    vec<T> total[n]{};
    const auto put = [&](T* row, const vec<T>* weight) {
#pragma GCC unroll 4
      for (int x = 0; x < n; ++x) {
        total[x] += weight[x];
        store(row + x * lanes<T>, weight[x]);
      }
    };
    if (bounded && whole) {
      for (int64_t j = 0; j < count; ++j) {
        T* const row = panel.scores + j * kWidth;
        vec<T> weight[n];
#pragma GCC unroll 4
        for (int x = 0; x < n; ++x) weight[x] = load(row + x * lanes<T>);
        exp2_normal<T>(weight);
        put(row, weight);
      }
    } else {
      vec<T> from[n], next[n];
#pragma GCC unroll 4
      for (int x = 0; x < n; ++x) {
        // With every score at -inf so far, any finite number gives the weights their zeros.
        const vec<T> level = load(panel.level + x * lanes<T>);
        from[x] = select<vec<T>>(level == -kInfinity<T>, vec<T>{}, level);
      }
      // The difference comes first: a mask of the most negative number, times the rate, would be
      // -inf. It is taken a key ahead, which shortens the chain of operations on one key.
      const auto measure = [&](const T* row) {
#pragma GCC unroll 4
        for (int x = 0; x < n; ++x) next[x] = (load(row + x * lanes<T>) - from[x]) * rate;
      };
      measure(panel.scores);
      for (int64_t j = 0; j < count; ++j) {
        T* const row = panel.scores + j * kWidth;
        vec<T> weight[n];
#pragma GCC unroll 4
        for (int x = 0; x < n; ++x) weight[x] = next[x];
        measure(row + kWidth);
        exp2_softmax<T>(weight);
        put(row, weight);
      }
    }
#pragma GCC unroll 4
    for (int x = 0; x < n; ++x)
      store(panel.sum + x * lanes<T>, load(panel.sum + x * lanes<T>) + total[x]);
  }

  // Brings the level of a panel up to its scores, which is seldom: these are far apart, or the
  // first.
  void follow(int64_t count, T rate, const Panel& panel) const {
    constexpr int n = kPanelVecs;
    vec<T> even[n], odd[n];  // the largest of every other key
    for (int x = 0; x < n; ++x) even[x] = odd[x] = load(panel.level + x * lanes<T>);
    for (int64_t j = 0; j < count; j += 2) {
      const T* const one = panel.scores + j * kWidth;
      const T* const other = panel.scores + std::min(j + 1, count - 1) * kWidth;
#pragma GCC unroll 4
      for (int x = 0; x < n; ++x) {
        even[x] = max(load(one + x * lanes<T>), even[x]);
        odd[x] = max(load(other + x * lanes<T>), odd[x]);
      }
    }
    for (int x = 0; x < n; ++x) {
      const vec<T> top = max(even[x], odd[x]);
      if (any(top > load(panel.level + x * lanes<T>) + kHeadroom / rate))
        raise(top, x * lanes<T>, rate, panel);
    }
  }

  // Brings one register of queries to another level, and all that was measured from it.
  __attribute__((noinline)) void raise(vec<T> top, int64_t first, T rate,
                                       const Panel& panel) const {
    const vec<T> before = load(panel.level + first);
    const vec<T> now = select<vec<T>>(top > before + kHeadroom / rate, top, before);
    // exp2(-inf - -inf) is NaN, where a row has seen no key so far: then there is nothing to
    // scale.
    const vec<T> factor =
        select<vec<T>>(before == now, 1 + vec<T>{}, exp2_softmax<T>((before - now) * rate));
    store(panel.level + first, now);
    store(panel.sum + first, load(panel.sum + first) * factor);
    for (int64_t d = 0; d < n_.D_v; ++d) {
      T* const at = panel.out + d * kWidth + first;
      store(at, load(at) * factor);
    }
  }

  int64_t gathered_rows() const { return p_.pages.table ? kKeyBlock * widest_ : 0; }

  // As many queries as fit in the cache, but fewer of the last heads, so that threads end together.
  std::vector<Chunk> cut(int threads) const {
    const int64_t longest = longest_queries(n_, p_.packing), heads = n_.B * n_.N_kv;
    const int64_t fit = kQueryBytes / (group_ * (n_.D + n_.D_v) * int64_t(sizeof(T)));
    std::vector<Chunk> chunks;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t pieces = threads > 1 ? ceil_div(2 * threads, heads - head) : 1;
      const int64_t even = std::max(ceil_div(longest, pieces), kFewestRows / group_);
      const int64_t length = round_up(std::max<int64_t>(1, std::min(fit, even)), kWidth);
      // The last queries see the most keys in a causal mask: they go first.
      for (int64_t i = (longest - 1) / length * length; i >= 0; i -= length)
        chunks.push_back({head, {i, std::min(i + length, longest)}});
    }
    return chunks;
  }
  int64_t longest_chunk() const {
    int64_t most = 0;
    for (const Chunk& chunk : chunks_) most = std::max(most, chunk.queries.size());
    return most;
  }

  const AttentionForward<S>& p_;
  const AttentionSizes& n_;
  const int64_t group_;
  const std::vector<Chunk> chunks_;
  const int64_t rows_, widest_, per_thread_;
  const Scratch<T> scratch_;
  const Scratch<S> gathered_;
};

}  // namespace

template <class S>
bool fill_panels(const AttentionForward<S>& p) {
  const AttentionSizes& n = p.sizes;
  const int64_t rows = rows_of_a_head(n, p.packing);
  constexpr int64_t width = kPanel<compute_t<S>>;
  return rows >= 4 * width && (round_up(rows, width) - rows) * 16 <= rows;
}

template <class S>
void attend_panels(int threads, const AttentionForward<S>& p) {
  const Panels<S> panels(threads, p);
  Items items(panels.items());
  parallel(static_cast<int>(std::min<int64_t>(threads, panels.items())), [&](const Team& team) {
    for (int64_t item; items.take(&item);) panels.run(team, item);
  });
}

template bool fill_panels(const AttentionForward<float>&);
template void attend_panels(int, const AttentionForward<float>&);
template bool fill_panels(const AttentionForward<double>&);
template void attend_panels(int, const AttentionForward<double>&);
template bool fill_panels(const AttentionForward<bf16>&);
template void attend_panels(int, const AttentionForward<bf16>&);
template bool fill_panels(const AttentionForward<f16>&);
template void attend_panels(int, const AttentionForward<f16>&);

}  // namespace pykernels
