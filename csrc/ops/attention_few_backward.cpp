// The gradient of attention for a few queries, as where one learned query pools a sequence: keys
// and values are read as they lie, rows of dK and dV are written span by span, and time is what
// that takes. Each span of keys has a part of dQ; they are added up in order, so that the number of
// threads changes nothing.
#include "attention_few.h"
#include "attention_weights.h"

namespace pykernels {
namespace {

// Queries by heads that share a head of keys, up to which this is faster than packed keys, by
// measurement.
constexpr int64_t kFewRowsBackward = 4;

template <class S>
class FewBackward {
  using T = compute_t<S>;

 public:
  FewBackward(int threads, const AttentionBackward<S>& p)
      : p_(p), n_(p.sizes), group_(n_.N / n_.N_kv), rows_(rows_of_a_head(n_, p.packing)),
        spans_(n_, p.packing, kFewKeys), depth_(round_up(n_.D, lanes<T>)),
        width_(round_up(n_.D_v, lanes<T>)),
        per_thread_(Arena<T>::padded(rows_ * depth_) + Arena<T>::padded(rows_ * width_) +
                    Arena<T>::padded(rows_ * kFewLine) * 2),
        scratch_(threads * per_thread_), parts_(p.dq.data ? items() * rows_ * depth_ : 0) {}

  int64_t items() const { return spans_.items(); }

  // One span of the keys of one head of one sequence.
  void run(const Team& team, int64_t item) const {
    Arena<T> arena(scratch_.get() + team.rank * per_thread_);
    T* const queries = arena.take(rows_ * depth_);
    T* const douts = arena.take(rows_ * width_);
    T* const weights = arena.take(rows_ * kFewLine);
    T* const dscores = arena.take(rows_ * kFewLine);
    const auto [b, g, j0] = spans_.place(item);
    const AttentionSizes n = sequence(n_, p_.packing, b);
    const int64_t rows = group_ * n.S_q;
    const Range keys{j0, std::min(j0 + kFewKeys, n.S_k)}, seen = visible_keys(n, {0, n.S_q}, keys);
    const View<S> k{p_.k.at(b, g, j0), p_.k.row, 1}, v{p_.v.at(b, g, j0), p_.v.row, 1};
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = head_of_row(n, g, r), i = r % n.S_q;
      T* const query = queries + r * depth_;
      T* const dout = douts + r * width_;
      T* const weight = weights + r * kFewLine;
      T* const dscore = dscores + r * kFewLine;
      to_pairs(p_.q.at(b, h, i), n.D, query);
      to_pairs(p_.dout.at(b, h, i), n.D_v, dout);
      alignas(kCacheLine) T delta[lanes<T>];
      multiply_rows(dout, View<S>{p_.out.at(b, h, i), 0, 1}, n.D_v, {0, 1}, delta);
      multiply_rows(query, k, n.D, seen, weight);
      multiply_rows(dout, v, n.D_v, seen, dscore);
      weigh_row<kFewKeys>(p_, n, b, h, i, keys, delta, weight, dscore);
      if (!p_.dq.data) continue;
      T* const part = parts_.get() + (item * rows_ + r) * depth_;
      std::fill(part, part + depth_, T(0));
      add_rows(dscore, k, n.D, seen, part);
    }
    if (p_.dk.data)
      spread(dscores, queries, depth_, rows, seen, n.D, p_.dk.at(b, g, j0), p_.dk.row, keys.size());
    if (p_.dv.data)
      spread(weights, douts, width_, rows, seen, n.D_v, p_.dv.at(b, g, j0), p_.dv.row, keys.size());
  }

  // After all items: this thread's share of the rows of dQ.
  void finish(const Team& team) const {
    const Range all = team.share(p_.dq.data ? n_.B * n_.N_kv * rows_ : 0);
    Arena<T> arena(scratch_.get() + team.rank * per_thread_);
    T* const sum = arena.take(depth_);
    for (int64_t at = all.begin; at < all.end; ++at) {
      const int64_t b = at / rows_ / n_.N_kv, g = at / rows_ % n_.N_kv, r = at % rows_;
      const AttentionSizes n = sequence(n_, p_.packing, b);
      if (r >= group_ * n.S_q) continue;
      std::fill(sum, sum + depth_, T(0));
      const Range spans = spans_.of(b, g);
      for (int64_t s = spans.begin; s < spans.end; ++s) {
        const T* const part = parts_.get() + (s * rows_ + r) * depth_;
        for (int64_t d = 0; d < depth_; d += lanes<T>)
          store(sum + d, load(sum + d) + load(part + d));
      }
      from_pairs(sum, n.D, p_.dq.at(b, head_of_row(n, g, r), r % n.S_q));
    }
  }

 private:
  // Row j of `to`, [count, columns], becomes the sum over the rows of weights[r, j] from[r], which
  // are in pairs; zeros where j is not `seen`.
  static void spread(const T* weights, const T* from, int64_t from_row, int64_t rows, Range seen,
                     int64_t columns, S* to, int64_t to_row, int64_t count) {
    constexpr int64_t width = lanes<T>;
    for (int64_t j = 0; j < count; ++j, to += to_row) {
      if (j < seen.begin || j >= seen.end) {
        std::fill_n(to, columns, S{});
        continue;
      }
      const auto sum = [&](int64_t d) {
        vec<T> total{};
        for (int64_t r = 0; r < rows; ++r)
          total += broadcast(weights[r * kFewLine + j]) * load(from + r * from_row + d);
        return total;
      };
      int64_t d = 0;
      for (; d + 2 * width <= columns; d += 2 * width) store_pair(to + d, {sum(d), sum(d + width)});
      for (; d < columns; d += width) store_n(to + d, sum(d), columns - d);
    }
  }

  const AttentionBackward<S>& p_;
  const AttentionSizes& n_;
  const int64_t group_, rows_;  // rows: queries by heads of a group
  const Spans spans_;
  const int64_t depth_, width_;  // D and D_v in whole registers
  const int64_t per_thread_;
  const Scratch<T> scratch_;
  const Scratch<T> parts_;  // [items, rows, depth]: of dQ, in pairs
};

}  // namespace

template <class S>
bool are_few_backward(const AttentionSizes& n, const AttentionPacking& packing,
                      const AttentionRule<S>& rule) {
  // Gradients of an additive mask and of sinks are made with packed keys. Whether they are wanted
  // is not known yet when the forward pass asks: it goes by what could have one.
  return n.N_kv > 0 && rule.mask.kind != AttentionMask::kAdditive && !rule.sinks &&
         rows_of_a_head(n, packing) <= kFewRowsBackward;
}

template <class S>
void attend_few_backward(int threads, const AttentionBackward<S>& p) {
  const FewBackward<S> few(threads, p);
  Items items(few.items());
  parallel(static_cast<int>(std::min<int64_t>(threads, few.items())), [&](const Team& team) {
    for (int64_t item; items.take(&item);) few.run(team, item);
    team.wait();
    few.finish(team);
  });
}

template bool are_few_backward(const AttentionSizes&, const AttentionPacking&,
                               const AttentionRule<float>&);
template void attend_few_backward(int, const AttentionBackward<float>&);
template bool are_few_backward(const AttentionSizes&, const AttentionPacking&,
                               const AttentionRule<double>&);
template void attend_few_backward(int, const AttentionBackward<double>&);
template bool are_few_backward(const AttentionSizes&, const AttentionPacking&,
                               const AttentionRule<bf16>&);
template void attend_few_backward(int, const AttentionBackward<bf16>&);
template bool are_few_backward(const AttentionSizes&, const AttentionPacking&,
                               const AttentionRule<f16>&);
template void attend_few_backward(int, const AttentionBackward<f16>&);

}  // namespace pykernels
