// Attention of neither few queries nor such as fill panels: see attention_forward.
//
// T. Dao, "FlashAttention-2" (2023), for caches instead of shared memory: scores exist for a few
// query rows by one block of keys, and the softmax is rescaled as the row maximum grows. The scale
// joins in where a score becomes a weight, 2^((score - top) * scale * log2(e)): rounded near zero,
// where scaling the queries beforehand would round at the size of a score.
#include "attention_tiles.h"

namespace pykernels {
namespace {

// Keys whose packed K and V a thread keeps in its second-level cache.
constexpr int64_t kKeyBlock = 512;
static_assert(kKeyBlock % kPanel<float> == 0 && kKeyBlock % kPanel<double> == 0);

// Query rows whose scores are computed before their softmax: a tile or two, to stay near the first
// level of cache.
constexpr int64_t kScoreRows = kTileRows * (kVecRegisters == 32 ? 1 : 2);

// Bytes of widened queries and of outputs that one thread keeps while all keys go past.
constexpr int64_t kQueryBytes = 1024 * 1024;

// One item is a chunk of queries of all heads that share one head of K and V: `group` heads by
// `chunk` queries, as rows in that order.
template <class S>
class Forward {
  using T = compute_t<S>;

 public:
  Forward(int threads, const AttentionForward<S>& p)
      : p_(p), n_(p.sizes), group_(std::max<int64_t>(1, n_.N / std::max<int64_t>(1, n_.N_kv))),
        out_width_(round_up(n_.D_v, kPanel<T>)), chunk_(choose_chunk(threads)),
        chunks_(ceil_div(longest_queries(n_, p.packing), chunk_)), rows_(group_ * chunk_),
        per_thread_(Arena<T>::padded(rows_ * n_.D) + Arena<T>::padded(rows_ * out_width_) +
                    Arena<T>::padded(rows_) * 2 + Arena<T>::padded(kScoreRows) * 2 +
                    Arena<T>::padded(kKeyBlock * n_.D) + Arena<T>::padded(kKeyBlock * out_width_) +
                    Arena<T>::padded(kScoreRows * (kKeyBlock + kRowPad)) +
                    Arena<T>::padded(kKeyBlock)),
        scratch_(threads * per_thread_), gathered_(threads * gathered_rows()) {}

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
    T* const keep = arena.take(kKeyBlock);
    S* const gathered = gathered_.get() + team.rank * gathered_rows();
    constexpr int64_t score_row = kKeyBlock + kRowPad;
    const T unit = score_unit(n_, p_.rule), rate = unit * T(kLog2E);

    // The last chunks see the most keys in a causal mask: they go first.
    const int64_t b = item / n_.N_kv % n_.B, g = item % n_.N_kv;
    const int64_t i0 = (chunks_ - 1 - item / (n_.B * n_.N_kv)) * chunk_;
    const AttentionSizes n = sequence(n_, p_.packing, b);
    const int64_t length = std::min(chunk_, n.S_q - i0), rows = group_ * length;
    if (length <= 0) return;
    const auto head = [&](int64_t row) { return g * group_ + row / length; };
    const auto query = [&](int64_t row) { return i0 + row % length; };

    for (int64_t r = 0; r < rows; r += length)
      copy_rows(p_.q.at(b, head(r), i0), p_.q.row, length, n_.D, queries + r * n_.D);
    std::fill(out, out + rows * out_width_, T(0));
    // A sink is a key that every row has seen beforehand.
    for (int64_t r = 0; r < rows; ++r) {
      maximum[r] = p_.rule.sinks ? T(widen(p_.rule.sinks[head(r)])) : -kInfinity<T>;
      sum[r] = maximum[r] == -kInfinity<T> ? T(0) : T(1);
    }

    const Range all = visible_keys(n, {i0, i0 + length}, {0, n.S_k});
    for (int64_t j0 = all.begin; j0 < all.end; j0 += kKeyBlock) {
      const int64_t keys = std::min(kKeyBlock, all.end - j0);
      const View<S> k = rows_of(p_.k, p_.pages, b, g, j0, keys, n_.D, gathered);
      pack_alone<T>(View<S>{k.data, k.column, k.row}, n_.D, keys, packed_k);
      const View<S> v = rows_of(p_.v, p_.pages, b, g, j0, keys, n_.D_v, gathered);
      pack_alone<T>(v, keys, n_.D_v, packed_v);
      for (int64_t r0 = 0; r0 < rows; r0 += kScoreRows) {
        const int64_t count = std::min(kScoreRows, rows - r0);
        Range mine[kScoreRows];  // keys of this block that a row sees
        Range seen{keys, 0};     // and that any of these rows sees
        for (int64_t r = 0; r < count; ++r) {
          const int64_t i = query(r0 + r);
          mine[r] = visible_keys(n, {i, i + 1}, {j0, j0 + keys});
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
          finish_scores(n, p_.rule, b, head(r0 + r), query(r0 + r), j0 + seen.begin, mine[r], row);
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
          if (p_.rule.dropout == 0) continue;
          draw_kept(p_.rule, b * n_.N + head(r0 + r), query(r0 + r), j0 + seen.begin, mine[r],
                    keep);
          for (int64_t j = mine[r].begin; j < mine[r].end; ++j)
            scores[r * score_row + j] *= keep[j];
        }
        multiply(count, n_.D_v, seen.size(), scores, score_row, 1,
                 packed_v + seen.begin * kPanel<T>, keys, true, out + r0 * out_width_, out_width_);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = row_of(n_, p_.packing, b, head(r), query(r));
      const T* const from = out + r * out_width_;
      const T inverse = sum[r] > 0 || sum[r] != sum[r] ? 1 / sum[r] : T(0);
      for (int64_t d = 0; d < n_.D_v; d += lanes<T>)
        store_n(p_.out.at(b, head(r), query(r)) + d, load(from + d) * inverse, n_.D_v - d);
      if (p_.lse) p_.lse[at] = maximum[r] * unit + std::log(sum[r]);
      if (!p_.rows.top) continue;
      p_.rows.top[at] = maximum[r] == -kInfinity<T> ? kInfinity<T> : maximum[r];
      p_.rows.inverse[at] = inverse;
    }
  }

 private:
  int64_t gathered_rows() const { return p_.pages.table ? kKeyBlock * std::max(n_.D, n_.D_v) : 0; }

  // As many queries as fit in the cache, unless that leaves threads idle.
  int64_t choose_chunk(int threads) const {
    const int64_t fit = kQueryBytes / (group_ * (n_.D + out_width_) * int64_t(sizeof(T)));
    const int64_t heads = n_.B * n_.N_kv;
    const int64_t pieces = heads ? ceil_div(threads > 1 ? 4 * threads : 1, heads) : 1;
    return std::max<int64_t>(
        1, std::min({round_up(std::max<int64_t>(fit, 1), kScoreRows),
                     round_up(ceil_div(longest_queries(n_, p_.packing), pieces), kScoreRows),
                     longest_queries(n_, p_.packing)}));
  }

  const AttentionForward<S>& p_;
  const AttentionSizes& n_;
  const int64_t group_, out_width_, chunk_, chunks_, rows_, per_thread_;
  const Scratch<T> scratch_;
  const Scratch<S> gathered_;
};

}  // namespace

template <class S>
void attention_forward(int threads, const AttentionForward<S>& p) {
  if (are_few(threads, p)) return attend_few(threads, p);
  if (fill_panels(p)) return attend_panels(threads, p);
  const Forward<S> forward(threads, p);
  Items items(forward.items());
  parallel(static_cast<int>(std::min<int64_t>(threads, forward.items())), [&](const Team& team) {
    for (int64_t item; items.take(&item);) forward.run(team, item);
  });
}

template void attention_forward<float>(int, const AttentionForward<float>&);
template void attention_forward<double>(int, const AttentionForward<double>&);
template void attention_forward<bf16>(int, const AttentionForward<bf16>&);
template void attention_forward<f16>(int, const AttentionForward<f16>&);

}  // namespace pykernels
