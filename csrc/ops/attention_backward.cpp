// The gradient of attention, its weights computed once more from the scores.
#include <memory>
#include <type_traits>

#include "attention_tiles.h"

namespace pykernels {
namespace {

// Query rows by keys of scores at a time, in the backward pass.
constexpr int64_t kBackwardRows = kVecRegisters == 32 ? 112 : 96;
constexpr int64_t kBackwardKeys = 128;

// With P the weights and delta_i = out_i . dout_i, one number a query:
//
//   dV = P^T dout    dP = dout V^T    dS = P * (dP - delta + dlse)    dQ = dS K    dK = dS^T Q
//
// where dQ and dK take the scale. Of few keys dP and delta are nearly equal, and what they were
// rounded by would show. So a query whose keys are all in one block gets its delta there, of these
// very dP: delta = sum P dP. Others are summed in the order of dP, which is the same sum where a
// query sees one key.
//
// An item is a block of keys of one head of K and V. A thread takes the blocks of a head one after
// the other, and when no head is left helps those that others are at: blocks of one head add to the
// same dQ, each a little behind the block before it, so that the order of additions is always the
// same. All that adds to one element of the mask's gradient is one item: where sequences or heads
// share a mask, they count as one head, and the item goes through them all.
template <class S>
class Backward {
  using T = compute_t<S>;

 public:
  Backward(int threads, const AttentionBackward<S>& p)
      : p_(p), n_(p.sizes), group_(n_.N / std::max<int64_t>(1, n_.N_kv)),
        batches_(p.dmask.data && p.dmask.batch == 0 ? n_.B : 1),
        heads_(p.dmask.data && p.dmask.head == 0 ? n_.N_kv : 1), width_(round_up(n_.D, kPanel<T>)),
        v_width_(round_up(n_.D_v, kPanel<T>)),
        blocks_(ceil_div(p.packing.queries ? p.packing.longest_k : n_.S_k, kBackwardKeys)),
        row_count_(row_count(n_, p.packing)),
        in_place_(std::is_same_v<S, T> && width_ == n_.D && !p.packing.queries),
        per_thread_(
            Arena<T>::padded(kBackwardKeys * n_.D) + Arena<T>::padded(kBackwardKeys * n_.D_v) +
            Arena<T>::padded(kBackwardKeys * width_) * 2 +
            Arena<T>::padded(kBackwardKeys * v_width_) + Arena<T>::padded(kBackwardRows * n_.D) +
            Arena<T>::padded(kBackwardRows * n_.D_v) + Arena<T>::padded(kBackwardRows * width_) +
            Arena<T>::padded(kBackwardRows * v_width_) +
            Arena<T>::padded(kBackwardRows * kTileLine) * 2),
        scratch_(threads * per_thread_),
        delta_(p.whole && blocks_ <= 1 && !p.dsinks ? 0 : row_count_),
        dq_scratch_(p.dq.data && !in_place_ ? row_count_ * width_ : 0),
        dq_(in_place_ ? reinterpret_cast<T*>(p.dq.data) : dq_scratch_.get()),
        sets_(n_.B * n_.N_kv / std::max<int64_t>(1, batches_ * heads_)), next_set_(sets_),
        next_block_(new std::atomic<int64_t>[sets_]()), done_(new Progress[sets_ * blocks_]) {}

  // Before any item: this thread's share of delta, and of a cleared dQ.
  void prepare(const Team& team) const {
    Arena<T> arena(scratch_.get() + team.rank * per_thread_);
    T* const douts = arena.take(n_.D_v * kPanel<T>);
    T* const outs = arena.take(n_.D_v * kPanel<T>);
    const int64_t panels = delta_.get() ? ceil_div(n_.S_q, kPanel<T>) : 0;  // of a head
    const Range mine = team.share((p_.packing.queries ? 1 : n_.B) * n_.N * panels);
    for (int64_t at = mine.begin; at < mine.end; ++at) {
      const int64_t i = at % panels * kPanel<T>, row = at / panels * n_.S_q + i;
      const int64_t count = std::min<int64_t>(kPanel<T>, n_.S_q - i);
      pack_panel(View<S>{row_at(p_.dout, row), 1, p_.dout.row}, n_.D_v, count, douts);
      pack_panel(View<S>{row_at(p_.out, row), 1, p_.out.row}, n_.D_v, count, outs);
      multiply_lanes(douts, outs, count, delta_.get() + row);
    }
    if (!p_.dq.data) return;
    const Range all = team.share(row_count_ * width_, lanes<T>);
    std::fill(dq_ + all.begin, dq_ + all.end, T(0));
  }

  // Items until none is left.
  void run(const Team& team) const {
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

    const auto run_set = [&](int64_t set) {
      for (int64_t block; (block = next_block_[set].fetch_add(1)) < blocks_;)
        run(set, block, tile, rows);
    };
    for (int64_t set; next_set_.take(&set);) run_set(set);
    for (int64_t set = 0; set < sets_; ++set) run_set(set);  // what others have begun
  }

  // After all items: this thread's share of the sinks, and of dQ where it is wanted.
  void finish(const Team& team) const {
    if (p_.dsinks) {
      const Range all = team.share(n_.N);
      for (int64_t h = all.begin; h < all.end; ++h) narrow(sink_gradient(h), p_.dsinks + h);
    }
    if (!p_.dq.data || in_place_) return;
    const Range rows = team.share(row_count_);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t d = 0; d < n_.D; d += lanes<T>)
        store_n(row_at(p_.dq, r) + d, load(dq_ + r * width_ + d), n_.D - d);
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

  // Row r of what is kept by query, in a tensor: the first sequence's rows lead to all packed ones.
  template <class U>
  U* row_at(const Heads<U>& tensor, int64_t r) const {
    return tensor.at(r / n_.S_q / n_.N, r / n_.S_q % n_.N, r % n_.S_q);
  }

  // to[r] = the sum of a[d, r] b[d, r] over D_v, two panels, in the order of multiply_in_chains.
  void multiply_lanes(const T* a, const T* b, int64_t count, T* to) const {
    constexpr int64_t width = kPanel<T>;
    vec<T> total[kPanelVecs]{};
    for (int64_t first = 0; first < n_.D_v; first += kChain) {
      vec<T> sum[kPanelVecs]{};
      for (int64_t d = first; d < std::min(first + kChain, n_.D_v); ++d)
#pragma GCC unroll 4
        for (int x = 0; x < kPanelVecs; ++x)
          sum[x] += load(a + d * width + x * lanes<T>) * load(b + d * width + x * lanes<T>);
#pragma GCC unroll 4
      for (int x = 0; x < kPanelVecs; ++x) total[x] = first ? total[x] + sum[x] : sum[x];
    }
#pragma GCC unroll 4
    for (int x = 0; x < kPanelVecs; ++x) store_n(to + x * lanes<T>, total[x], count - x * lanes<T>);
  }

  // A sink's value is 0, so that its score gets P * (0 - delta) from each query. Of signs of either
  // kind: what a sum in float32 rounds would show beside what is left.
  T sink_gradient(int64_t h) const {
    const T sink = T(widen(p_.rule.sinks[h]));
    double sum = 0;
    for (int64_t b = 0; b < n_.B; ++b) {
      for (int64_t i = 0; i < sequence(n_, p_.packing, b).S_q; ++i) {
        const int64_t at = row_of(n_, p_.packing, b, h, i);
        const double weight = std::exp(double(sink) - p_.rows.top[at]) * p_.rows.inverse[at];
        sum -= weight * (double(delta_.get()[at]) - (p_.dlse ? p_.dlse[at] : 0));
      }
    }
    return static_cast<T>(sum);
  }

  // One block of the keys of all heads of a set.
  void run(int64_t set, int64_t block, const Tile& tile, const Rows& rows) const {
    const int64_t wide = std::max<int64_t>(1, n_.N_kv / heads_);  // sets over the heads
    const int64_t b0 = set / wide * batches_, g0 = set % wide * heads_;
    Progress* const done = done_.get() + set * blocks_ + block;
    for (int64_t b = b0; b < b0 + batches_; ++b)
      for (int64_t g = g0; g < g0 + heads_; ++g)
        run_head(b, g, block * kBackwardKeys, tile, rows, block ? done - 1 : nullptr, done);
    done->reach(std::numeric_limits<int64_t>::max());
  }

  // The share of a block of keys, from j0 on, in the gradients of one head of K and V. A row of dQ
  // is `before`'s, the item of the block before, until it has been there.
  void run_head(int64_t b, int64_t g, int64_t j0, const Tile& tile, const Rows& rows,
                const Progress* before, Progress* done) const {
    const AttentionSizes n = sequence(n_, p_.packing, b);
    const int64_t keys = std::min(kBackwardKeys, n.S_k - j0);
    if (keys <= 0) return;
    const S* const k = p_.k.at(b, g, j0);
    pack_alone<T>(View<S>{k, 1, p_.k.row}, n_.D, keys, tile.keys_t);
    pack_alone<T>(View<S>{p_.v.at(b, g, j0), 1, p_.v.row}, n_.D_v, keys, tile.values_t);
    pack_alone<T>(View<S>{k, p_.k.row, 1}, keys, n_.D, tile.keys_scaled);
    scale_row(tile.keys_scaled, keys * width_, T(n_.scale));
    std::fill(tile.dk, tile.dk + keys * width_, T(0));
    std::fill(tile.dv, tile.dv + keys * v_width_, T(0));
    for (int64_t h = g * group_; h < (g + 1) * group_; ++h) {
      // The queries that see any of these keys: the later the block, the later they begin and end.
      const int64_t end = std::min(n.S_q, j0 + keys - n.first);
      for (int64_t i0 = std::max<int64_t>(0, j0 - n.last); i0 < end; i0 += kBackwardRows) {
        const int64_t count = std::min(kBackwardRows, end - i0);
        Range seen = visible_keys(n, {i0, i0 + count}, {j0, j0 + keys});
        seen.begin -= seen.begin % kPanel<T>;
        weights(n, b, h, i0, count, j0, seen, tile.keys_t, tile.values_t, rows);
        if (p_.dv.data)
          multiply(seen.size(), n_.D_v, count, rows.weights, 1, kTileLine, rows.dout_panels, count,
                   true, tile.dv + seen.begin * v_width_, v_width_);
        if (p_.dk.data)
          multiply(seen.size(), n_.D, count, rows.dscores, 1, kTileLine, rows.query_panels, count,
                   true, tile.dk + seen.begin * width_, width_);
        if (!p_.dq.data) continue;
        const int64_t row = row_of(n_, p_.packing, b, h, i0);
        if (before) before->await(row + count);
        multiply(count, n_.D, seen.size(), rows.dscores, kTileLine, 1,
                 tile.keys_scaled + seen.begin * kPanel<T>, keys, true, dq_ + row * width_, width_);
        done->reach(row + count);
      }
    }
    if (p_.dk.data) write(tile.dk, keys, n_.D, width_, T(n_.scale), p_.dk.at(b, g, j0), p_.dk.row);
    if (p_.dv.data) write(tile.dv, keys, n_.D_v, v_width_, T(1), p_.dv.at(b, g, j0), p_.dv.row);
  }

  // P and dS of queries [i0, i0 + count) by the keys j0 + `seen`.
  void weights(const AttentionSizes& n, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t j0,
               Range seen, const T* keys_t, const T* values_t, const Rows& rows) const {
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
    const T rate = score_unit(n_, p_.rule) * T(kLog2E);
    for (int64_t r = 0; r < count; ++r) {
      T* const weight = rows.weights + r * kTileLine;
      T* const dscore = rows.dscores + r * kTileLine;
      const int64_t first = j0 + seen.begin, i = i0 + r;
      const Range mine = visible_keys(n, {i, i + 1}, {first, first + seen.size()});
      alignas(kCacheLine) T growth[kTileLine], keep[kTileLine];
      finish_scores(n, p_.rule, b, h, i, first, mine, weight, growth);
      std::fill(weight, weight + mine.begin, -kInfinity<T>);
      const int64_t at = row_of(n_, p_.packing, b, h, i);
      const vec<T> top = broadcast(p_.rows.top[at]), inverse = broadcast(p_.rows.inverse[at]);
      if (p_.rule.dropout > 0) {
        draw_kept(p_.rule, b * n_.N + h, i, first, mine, keep);
        for (int64_t j = mine.begin; j < mine.end; ++j) dscore[j] *= keep[j];
      }
      // What an unseen key has may be NaN.
      std::fill(dscore, dscore + mine.begin, T(0));
      fill(dscore, mine.end, mine.end, T(0));
      fill(weight, mine.end, mine.end, -kInfinity<T>);
      vec<T> total{}, products{};
      for (int64_t j = 0; j < mine.end; j += lanes<T>) {
        const vec<T> p = exp2_softmax<T>((load(weight + j) - top) * rate) * inverse;
        store(weight + j, p);
        total += p;
        products += p * load(dscore + j);
      }
      T delta;
      if (p_.whole && mine.size() == visible_keys(n, {i, i + 1}, {0, n.S_k}).size()) {
        // All weights add up to 1, but for roundings; a sink's is not among these.
        const T sum = p_.rule.sinks ? T(1) : reduce_add(total);
        delta = sum > 0 ? reduce_add(products) / sum : T(0);
        if (p_.dsinks) delta_.get()[at] = delta;
      } else {
        delta = delta_.get()[at];
      }
      const T dlse = p_.dlse ? p_.dlse[at] : T(0);
      for (int64_t j = 0; j < mine.end; j += lanes<T>)
        store(dscore + j, load(weight + j) * (load(dscore + j) - delta + dlse));
      if (p_.rule.dropout > 0)
        for (int64_t j = mine.begin; j < mine.end; ++j) weight[j] *= keep[j];
      if (p_.dmask.data) {
        T* const to = p_.dmask.at(b, h, i) + first;
        for (int64_t j = mine.begin; j < mine.end; ++j) to[j] += dscore[j];
      }
      if (n_.softcap > 0)
        for (int64_t j = mine.begin / lanes<T> * lanes<T>; j < mine.end; j += lanes<T>)
          store(dscore + j, load(dscore + j) * load(growth + j));
      std::fill(dscore, dscore + mine.begin, T(0));
      fill(weight, mine.end, seen.size(), T(0));
      fill(dscore, mine.end, seen.size(), T(0));
    }
  }

  static void write(const T* from, int64_t rows, int64_t columns, int64_t from_row, T factor, S* to,
                    int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < columns; d += lanes<T>)
        store_n(to + i * to_row + d, load(from + i * from_row + d) * factor, columns - d);
  }

  const AttentionBackward<S>& p_;
  const AttentionSizes& n_;
  const int64_t group_;
  const int64_t batches_, heads_;  // sequences and heads of K and V that one item goes through
  const int64_t width_, v_width_, blocks_, row_count_;
  const bool in_place_;  // dQ is summed where it is wanted
  const int64_t per_thread_;
  const Scratch<T> scratch_, delta_, dq_scratch_;
  T* const dq_;  // [rows, width]
  const int64_t sets_;
  mutable Items next_set_;
  const std::unique_ptr<std::atomic<int64_t>[]> next_block_;  // [sets]
  const std::unique_ptr<Progress[]> done_;                    // [sets, blocks]: rows of dQ
};

}  // namespace

template <class S>
void attention_backward(int threads, const AttentionBackward<S>& p) {
  const Backward<S> backward(threads, p);
  parallel(threads, [&](const Team& team) {
    backward.prepare(team);
    team.wait();
    backward.run(team);
    team.wait();
    backward.finish(team);
  });
}

template void attention_backward<float>(int, const AttentionBackward<float>&);
template void attention_backward<double>(int, const AttentionBackward<double>&);
template void attention_backward<bf16>(int, const AttentionBackward<bf16>&);
template void attention_backward<f16>(int, const AttentionBackward<f16>&);

}  // namespace pykernels
