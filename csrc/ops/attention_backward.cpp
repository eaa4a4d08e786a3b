// The gradient of attention, its weights computed once more from the scores.
#include <memory>
#include <type_traits>

#include "attention_weights.h"

namespace pykernels {
namespace {

// Query rows by keys of scores at a time, in the backward pass.
constexpr int64_t kBackwardRows = kVecRegisters == 32 ? 112 : 96;
constexpr int64_t kBackwardKeys = 128;
// Where the mask ends within the keys of a tile, what its queries see is near a triangle: fewer of
// them waste less of the rest.
constexpr int64_t kEdgeRows = kBackwardRows / 4;

// With P the weights and delta_i = out_i . dout_i, one number a query:
//
//   dV = P^T dout    dP = dout V^T    dS = P * (dP - delta + dlse)    dQ = dS K    dK = dS^T Q
//
// where dQ and dK take the scale.
//
// An item is a block of keys of one head of K and V. A thread takes the blocks of a head one after
// the other, and when no head is left helps those that others are at: blocks of one head add to the
// same dQ, each a little behind the block before it, so that the order of additions is always the
// same. All that adds to one element of the mask's gradient is one item: where sequences or heads
// share a mask, they count as one head, and the item goes through them all.
//
// What is kept by query lies in memory of the thread that opens a set of heads. Since helpers come
// when no set is left, a thread that opens its next set is alone with the one before.
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
        single_(p.whole && blocks_ <= 1),
        in_place_(std::is_same_v<S, T> && width_ == n_.D && !p.packing.queries),
        head_rows_(longest_queries(n_, p.packing)),
        batch_rows_((in_place_ ? n_.N : heads_ * group_) * head_rows_),
        set_rows_((batches_ - 1) * batch_rows_ + heads_ * group_ * head_rows_),
        per_thread_(
            Arena<T>::padded(kBackwardKeys * n_.D) + Arena<T>::padded(kBackwardKeys * n_.D_v) +
            Arena<T>::padded(kBackwardKeys * width_) * 2 +
            Arena<T>::padded(kBackwardKeys * v_width_) + Arena<T>::padded(kBackwardRows * n_.D) +
            Arena<T>::padded(kBackwardRows * n_.D_v) + Arena<T>::padded(kBackwardRows * width_) +
            Arena<T>::padded(kBackwardRows * v_width_) +
            Arena<T>::padded(kBackwardRows * kTileLine) * 2),
        per_slot_(Arena<T>::padded(set_rows_) +
                  (p.dq.data && !in_place_ ? Arena<T>::padded(set_rows_ * width_) : 0)),
        sets_(n_.B * n_.N_kv / std::max<int64_t>(1, batches_ * heads_)),
        slots_(std::min<int64_t>(threads, sets_)), scratch_(threads * per_thread_),
        kept_(slots_ * per_slot_), sinks_(p.dsinks ? n_.B * n_.N : 0), next_set_(sets_),
        states_(new State[sets_]), done_(new Progress[sets_ * blocks_]) {}

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

    for (int64_t index; next_set_.take(&index);) {
      State& state = states_[index];
      state.slot = sets_ == slots_ ? index : team.rank;
      const Set set = set_at(index);
      open(set, rows);
      state.opened.reach(1);
      run_blocks(index, set, tile, rows);
      end_part(index, set);
    }
    for (int64_t index = 0; index < sets_; ++index) {  // what others have begun
      if (states_[index].next_block.load() >= blocks_) continue;
      states_[index].opened.await(1);
      run_blocks(index, set_at(index), tile, rows);
    }
  }

  // After all items: this thread's share of the sinks.
  void finish(const Team& team) const {
    const Range all = team.share(n_.N);
    for (int64_t h = all.begin; h < all.end; ++h) {
      double sum = 0;
      for (int64_t b = 0; b < n_.B; ++b) sum += sinks_.get()[b * n_.N + h];
      narrow(static_cast<T>(sum), p_.dsinks + h);
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

  // How far a set is.
  struct State {
    Progress opened;
    int64_t slot = 0;  // of what is kept by query; from when it is opened
    std::atomic<int64_t> next_block{0}, ended{0};
  };

  // Sequences [b0, b0 + batches_) and heads of K and V [g0, g0 + heads_), and what their queries
  // keep.
  struct Set {
    int64_t b0, g0;
    T* delta;  // [set_rows_]
    T* dq;     // [set_rows_, width_]
  };

  Set set_at(int64_t index) const {
    const int64_t wide = std::max<int64_t>(1, n_.N_kv / heads_);  // sets over the heads
    const int64_t b0 = index / wide * batches_, g0 = index % wide * heads_;
    Arena<T> arena(kept_.get() + states_[index].slot * per_slot_);
    T* const delta = arena.take(set_rows_);
    if (!p_.dq.data) return {b0, g0, delta, nullptr};
    T* const there = reinterpret_cast<T*>(p_.dq.at(b0, g0 * group_, 0));
    return {b0, g0, delta, in_place_ ? there : arena.take(set_rows_ * width_)};
  }

  int64_t row_in(const Set& set, int64_t b, int64_t h, int64_t i) const {
    return (b - set.b0) * batch_rows_ + (h - set.g0 * group_) * head_rows_ + i;
  }

  // Runs body(b, h, queries, row) for each head of Q, `row` that of its first query in the set.
  template <class Body>
  void for_heads(const Set& set, const Body& body) const {
    for (int64_t b = set.b0; b < set.b0 + batches_; ++b)
      for (int64_t h = set.g0 * group_; h < (set.g0 + heads_) * group_; ++h)
        body(b, h, sequence(n_, p_.packing, b).S_q, row_in(set, b, h, 0));
  }

  // Before any block of a set: delta, and a cleared dQ.
  void open(const Set& set, const Rows& rows) const {
    for_heads(set, [&](int64_t b, int64_t h, int64_t queries, int64_t row) {
      if (set.dq) std::fill_n(set.dq + row * width_, queries * width_, T(0));
      if (single_) std::fill_n(set.delta + row, queries, T(0));  // for those that see no key
      for (int64_t i = 0; i < queries && !single_; i += kPanel<T>) {
        const int64_t count = std::min<int64_t>(kPanel<T>, queries - i);
        pack_panel(View<S>{p_.dout.at(b, h, i), 1, p_.dout.row}, n_.D_v, count, rows.douts);
        pack_panel(View<S>{p_.out.at(b, h, i), 1, p_.out.row}, n_.D_v, count, rows.dout_panels);
        multiply_lanes(rows.douts, rows.dout_panels, count, set.delta + row + i);
      }
    });
  }

  // The blocks of a set that are left.
  void run_blocks(int64_t index, const Set& set, const Tile& tile, const Rows& rows) const {
    for (int64_t block; (block = states_[index].next_block.fetch_add(1)) < blocks_;) {
      run(index, block, set, tile, rows);
      end_part(index, set);
    }
  }

  // One block of a set has ended, or what its first thread had to do: the last to end brings what
  // is kept by query to where it is wanted.
  void end_part(int64_t index, const Set& set) const {
    if (states_[index].ended.fetch_add(1) < blocks_) return;
    if (!p_.dsinks && (in_place_ || !p_.dq.data)) return;
    for_heads(set, [&](int64_t b, int64_t h, int64_t queries, int64_t row) {
      if (p_.dsinks) sinks_.get()[b * n_.N + h] = sink_gradient(b, h, queries, set.delta + row);
      if (in_place_ || !p_.dq.data) return;
      write(set.dq + row * width_, queries, n_.D, width_, T(1), p_.dq.at(b, h, 0), p_.dq.row);
    });
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

  // A sink's value is 0, so that its score gets P * (0 - delta + dlse) from each query. In double,
  // as terms of either sign cancel.
  double sink_gradient(int64_t b, int64_t h, int64_t queries, const T* delta) const {
    const double sink = widen(p_.rule.sinks[h]);
    double sum = 0;
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t at = row_of(n_, p_.packing, b, h, i);
      const double weight = std::exp(sink - p_.rows.top[at]) * p_.rows.inverse[at];
      sum -= weight * (double(delta[i]) - (p_.dlse ? p_.dlse[at] : 0));
    }
    return sum;
  }

  // One block of the keys of all heads of a set.
  void run(int64_t index, int64_t block, const Set& set, const Tile& tile, const Rows& rows) const {
    Progress* const done = done_.get() + index * blocks_ + block;
    for (int64_t b = set.b0; b < set.b0 + batches_; ++b)
      for (int64_t g = set.g0; g < set.g0 + heads_; ++g)
        run_head(b, g, block * kBackwardKeys, set, tile, rows, block ? done - 1 : nullptr, done);
    done->reach(std::numeric_limits<int64_t>::max());
  }

  // The share of a block of keys, from j0 on, in the gradients of one head of K and V. A row of dQ
  // is `before`'s, the item of the block before, until it has been there.
  void run_head(int64_t b, int64_t g, int64_t j0, const Set& set, const Tile& tile,
                const Rows& rows, const Progress* before, Progress* done) const {
    const AttentionSizes n = sequence(n_, p_.packing, b);
    const int64_t keys = std::min(kBackwardKeys, n.S_k - j0);
    if (keys <= 0) return;
    const S* const k = p_.k.at(b, g, j0);
    fetch_rows(k, p_.k.row, keys, n_.D);
    fetch_rows(p_.v.at(b, g, j0), p_.v.row, keys, n_.D_v);
    pack_alone<T>(View<S>{k, 1, p_.k.row}, n_.D, keys, tile.keys_t);
    pack_alone<T>(View<S>{p_.v.at(b, g, j0), 1, p_.v.row}, n_.D_v, keys, tile.values_t);
    pack_alone<T>(View<S>{k, p_.k.row, 1}, keys, n_.D, tile.keys_scaled);
    scale_row(tile.keys_scaled, keys * width_, T(n_.scale));
    std::fill(tile.dk, tile.dk + keys * width_, T(0));
    std::fill(tile.dv, tile.dv + keys * v_width_, T(0));
    for (int64_t h = g * group_; h < (g + 1) * group_; ++h) {
      // The queries that see any of these keys: the later the block, the later they begin and end.
      const int64_t end = std::min(n.S_q, j0 + keys - n.first);
      for (int64_t i0 = std::max<int64_t>(0, j0 - n.last), count; i0 < end; i0 += count) {
        const bool edge = visible_keys(n, {i0, i0 + 1}, {j0, j0 + keys}).size() < keys;
        count = std::min(edge ? kEdgeRows : kBackwardRows, end - i0);
        Range seen = visible_keys(n, {i0, i0 + count}, {j0, j0 + keys});
        seen.begin -= seen.begin % kPanel<T>;
        const int64_t row = row_in(set, b, h, i0);
        weights(n, b, h, i0, count, j0, seen, tile.keys_t, tile.values_t, set.delta + row, rows);
        if (p_.dv.data)
          multiply(seen.size(), n_.D_v, count, rows.weights, 1, kTileLine, rows.dout_panels, count,
                   true, tile.dv + seen.begin * v_width_, v_width_);
        if (p_.dk.data)
          multiply(seen.size(), n_.D, count, rows.dscores, 1, kTileLine, rows.query_panels, count,
                   true, tile.dk + seen.begin * width_, width_);
        if (!p_.dq.data) continue;
        if (before) before->await(row + count);
        multiply(count, n_.D, seen.size(), rows.dscores, kTileLine, 1,
                 tile.keys_scaled + seen.begin * kPanel<T>, keys, true, set.dq + row * width_,
                 width_);
        done->reach(row + count);
      }
    }
    if (p_.dk.data) write(tile.dk, keys, n_.D, width_, T(n_.scale), p_.dk.at(b, g, j0), p_.dk.row);
    if (p_.dv.data) write(tile.dv, keys, n_.D_v, v_width_, T(1), p_.dv.at(b, g, j0), p_.dv.row);
  }

  // P and dS of queries [i0, i0 + count) by the keys j0 + `seen`.
  void weights(const AttentionSizes& n, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t j0,
               Range seen, const T* keys_t, const T* values_t, T* deltas, const Rows& rows) const {
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
    const int64_t first = j0 + seen.begin;
    for (int64_t r = 0; r < count; ++r)
      weigh_row<kBackwardKeys>(p_, n, b, h, i0 + r, {first, first + seen.size()}, deltas + r,
                               rows.weights + r * kTileLine, rows.dscores + r * kTileLine);
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
  const int64_t width_, v_width_, blocks_;
  const bool single_;                                // all keys of a query are in one block
  const bool in_place_;                              // dQ is summed where it is wanted
  const int64_t head_rows_, batch_rows_, set_rows_;  // of what is kept by query
  const int64_t per_thread_, per_slot_, sets_, slots_;
  const Scratch<T> scratch_, kept_;
  const Scratch<double> sinks_;  // [B, N]: the gradient by sequence
  mutable Items next_set_;
  const std::unique_ptr<State[]> states_;   // [sets]
  const std::unique_ptr<Progress[]> done_;  // [sets, blocks]: rows of dQ
};

}  // namespace

template <class S>
void attention_backward(int threads, const AttentionBackward<S>& p) {
  if (are_few_backward(p.sizes, p.packing, p.rule)) return attend_few_backward(threads, p);
  const Backward<S> backward(threads, p);
  parallel(threads, [&](const Team& team) {
    backward.run(team);
    if (!p.dsinks) return;
    team.wait();
    backward.finish(team);
  });
}

template void attention_backward<float>(int, const AttentionBackward<float>&);
template void attention_backward<double>(int, const AttentionBackward<double>&);
template void attention_backward<bf16>(int, const AttentionBackward<bf16>&);
template void attention_backward<f16>(int, const AttentionBackward<f16>&);

}  // namespace pykernels
