// Attention of a few queries, as in decoding: every key and value is read once, as it lies, and
// time is what reading them takes. Keys are split over the threads in spans of a fixed length, and
// what the spans give is merged in order, so that the number of threads changes nothing.
#include "attention_few.h"

namespace pykernels {
namespace {

// Queries by heads that share a head of keys, up to which keys read as they lie beat packed ones,
// by measurement; of 16-bit storage, each query widens them again.
template <class S>
constexpr int64_t kFewRows = sizeof(S) < 4 ? 2 : 3;

// And where spans of keys keep more threads busy than heads do.
constexpr int64_t kFewRowsOfFewHeads = 4;

// Keys of one item.
constexpr int64_t kSpan = 1024;

template <class S>
class Few {
  using T = compute_t<S>;

 public:
  Few(int threads, const AttentionForward<S>& p)
      : p_(p), n_(p.sizes), group_(n_.N / n_.N_kv), rows_(rows_of_a_head(n_, p.packing)),
        spans_(n_, p.packing, kSpan), depth_(round_up(n_.D, lanes<T>)),
        width_(round_up(n_.D_v, lanes<T>)),
        per_thread_(Arena<T>::padded(rows_ * depth_) + Arena<T>::padded(rows_ * kFewLine) +
                    Arena<T>::padded(kFewKeys) + Arena<T>::padded(width_)),
        scratch_(threads * per_thread_), parts_(items() * rows_ * part_size()),
        gathered_(p.pages.table ? threads * kFewKeys * std::max(n_.D, n_.D_v) : 0) {}

  int64_t items() const { return spans_.items(); }

  // One span of the keys of one head of one sequence.
  void run(const Team& team, int64_t item) const {
    Arena<T> arena(scratch_.get() + team.rank * per_thread_);
    T* const queries = arena.take(rows_ * depth_);
    T* const scores = arena.take(rows_ * kFewLine);
    T* const keep = arena.take(kFewKeys);
    S* const gathered =
        gathered_.get() + (p_.pages.table ? team.rank * kFewKeys * std::max(n_.D, n_.D_v) : 0);
    const auto [b, g, begin] = spans_.place(item);
    const AttentionSizes n = sequence(n_, p_.packing, b);
    const T rate = score_unit(n_, p_.rule) * T(kLog2E);
    const int64_t rows = group_ * n.S_q;

    for (int64_t r = 0; r < rows; ++r) {
      to_pairs(p_.q.at(b, head_of_row(n, g, r), r % n.S_q), n.D, queries + r * depth_);
      Part part = part_of(item, r);
      *part.maximum = -kInfinity<T>;
      *part.sum = 0;
      std::fill(part.out, part.out + width_, T(0));
    }
    const int64_t end = std::min(begin + kSpan, n.S_k);
    for (int64_t j0 = begin; j0 < end; j0 += kFewKeys) {
      const int64_t keys = std::min(kFewKeys, end - j0);
      const Range seen = visible_keys(n, {0, n.S_q}, {j0, j0 + keys});
      if (seen.size() == 0) continue;
      const View<S> k = rows_of(p_.k, p_.pages, b, g, j0, keys, n.D, gathered);
      for (int64_t r = 0; r < rows; ++r)
        multiply_rows(queries + r * depth_, k, n.D, seen, scores + r * kFewLine);
      const View<S> v = rows_of(p_.v, p_.pages, b, g, j0, keys, n.D_v, gathered);
      for (int64_t r = 0; r < rows; ++r) {
        T* const row = scores + r * kFewLine;
        const int64_t h = head_of_row(n, g, r), i = r % n.S_q;
        const Range mine = visible_keys(n, {i, i + 1}, {j0, j0 + keys});
        if (mine.size() == 0) continue;
        finish_scores(n, p_.rule, b, h, i, j0, mine, row);
        std::fill(row, row + mine.begin, -kInfinity<T>);
        Part part = part_of(item, r);
        const T before = *part.maximum, top = row_maximum(row, mine.end, before);
        if (top != before) {
          // Of nothing so far, any factor will do but the NaN of -inf - -inf.
          const T factor = before == -kInfinity<T> ? T(0) : power((before - top) * rate);
          scale_row(part.out, width_, factor);
          *part.sum *= factor;
          *part.maximum = top;
        }
        *part.sum += weigh(row, mine.end, mine.end, top, rate);
        if (p_.rule.dropout > 0) {
          draw_kept(p_.rule, b * n_.N + h, i, j0, mine, keep);
          for (int64_t j = mine.begin; j < mine.end; ++j) row[j] *= keep[j];
        }
        add_rows(row, v, n.D_v, mine, part.out);
      }
    }
  }

  // After all items: this thread's share of the rows, their spans merged in order.
  void finish(const Team& team) const {
    const T unit = score_unit(n_, p_.rule), rate = unit * T(kLog2E);
    const Range all = team.share(n_.B * n_.N_kv * rows_);
    T* const total = scratch_.get() + team.rank * per_thread_;
    for (int64_t at = all.begin; at < all.end; ++at) {
      const int64_t b = at / rows_ / n_.N_kv, g = at / rows_ % n_.N_kv, r = at % rows_;
      const AttentionSizes n = sequence(n_, p_.packing, b);
      if (r >= group_ * n.S_q) continue;
      const int64_t h = head_of_row(n, g, r), i = r % n.S_q;
      const Range spans = spans_.of(b, g);
      T top = p_.rule.sinks ? T(widen(p_.rule.sinks[h])) : -kInfinity<T>;
      const T sink = top;
      for (int64_t s = spans.begin; s < spans.end; ++s) {
        const T maximum = *part_of(s, r).maximum;
        top = maximum > top || maximum != maximum ? maximum : top;
      }
      T sum = sink == -kInfinity<T> ? T(0) : power((sink - top) * rate);
      S* const out = p_.out.at(b, h, i);
      std::fill(total, total + width_, T(0));
      for (int64_t s = spans.begin; s < spans.end; ++s) {
        const Part part = part_of(s, r);
        const T factor =
            *part.maximum == -kInfinity<T> ? T(0) : power((*part.maximum - top) * rate);
        sum += *part.sum * factor;
        for (int64_t d = 0; d < width_; d += lanes<T>) {
          const vec<T> scaled = load(part.out + d) * factor;
          store(total + d, s > spans.begin ? load(total + d) + scaled : scaled);
        }
      }
      const T inverse = sum > 0 || sum != sum ? 1 / sum : T(0);
      scale_row(total, width_, inverse);
      from_pairs(total, n.D_v, out);
      const int64_t row = row_of(n_, p_.packing, b, h, i);
      if (p_.lse) p_.lse[row] = top * unit + std::log(sum);
      if (!p_.rows.top) continue;
      p_.rows.top[row] = top == -kInfinity<T> ? kInfinity<T> : top;
      p_.rows.inverse[row] = inverse;
    }
  }

 private:
  // What one span gives one row: as if there were no other keys, but for the division by the sum.
  // As queries are, `out` is in pairs.
  struct Part {
    T *maximum, *sum, *out;
  };
  int64_t part_size() const { return Arena<T>::padded(width_ + 2); }
  Part part_of(int64_t item, int64_t r) const {
    T* const at = parts_.get() + (item * rows_ + r) * part_size();
    return {at + width_, at + width_ + 1, at};
  }

  static T power(T x) { return exp2_softmax<T>(broadcast(x))[0]; }

  const AttentionForward<S>& p_;
  const AttentionSizes& n_;
  const int64_t group_, rows_;  // rows: queries by heads of a group
  const Spans spans_;
  const int64_t depth_, width_;  // D and D_v in whole registers
  const int64_t per_thread_;
  const Scratch<T> scratch_, parts_;
  const Scratch<S> gathered_;
};

}  // namespace

template <class S>
bool are_few(int threads, const AttentionForward<S>& p) {
  const AttentionSizes& n = p.sizes;
  if (p.rows.top) return are_few_backward<S>(n, p.packing, p.rule);
  return n.N_kv > 0 && rows_of_a_head(n, p.packing) <=
                           (n.B * n.N_kv < threads ? kFewRowsOfFewHeads : kFewRows<S>);
}

template <class S>
void attend_few(int threads, const AttentionForward<S>& p) {
  const Few<S> few(threads, p);
  Items items(few.items());
  parallel(static_cast<int>(std::min<int64_t>(threads, few.items())), [&](const Team& team) {
    for (int64_t item; items.take(&item);) few.run(team, item);
    team.wait();
    few.finish(team);
  });
}

template bool are_few(int, const AttentionForward<float>&);
template void attend_few(int, const AttentionForward<float>&);
template bool are_few(int, const AttentionForward<double>&);
template void attend_few(int, const AttentionForward<double>&);
template bool are_few(int, const AttentionForward<bf16>&);
template void attend_few(int, const AttentionForward<bf16>&);
template bool are_few(int, const AttentionForward<f16>&);
template void attend_few(int, const AttentionForward<f16>&);

}  // namespace pykernels
