// The gradient of attention, its weights computed once more from the scores.
#include <memory>
#include <type_traits>

#include "attention_weights.h"

namespace pykernels {
namespace {

// Query rows by keys of scores at a time, in the backward pass.
constexpr int64_t kBackwardRows = kVecRegisters == 32 ? 112 : 96;
constexpr int64_t kBackwardKeys = 128;

// Rows of a product that are cut to what they see together: fewer are cut closer, but the processor
// does not foresee where their sums end.
constexpr int64_t kEdgeRows = 2 * kTileRows;

// With P the weights and delta_i = out_i . dout_i, one number a query:
//
//   dV = P^T dout    dP = dout V^T    dS = P * (dP - delta + dlse)    dQ = dS K    dK = dS^T Q
//
// where dS takes the scale, but not as the gradient of the mask.
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
      : p_(p), n_(p.sizes), threads_(threads), group_(n_.N / std::max<int64_t>(1, n_.N_kv)),
        batches_(p.dmask.data && p.dmask.batch == 0 ? n_.B : 1),
        heads_(p.dmask.data && p.dmask.head == 0 ? n_.N_kv : 1), width_(round_up(n_.D, kPanel<T>)),
        v_width_(round_up(n_.D_v, kPanel<T>)),
        blocks_(ceil_div(p.packing.queries ? p.packing.longest_k : n_.S_k, kBackwardKeys)),
        single_(p.whole && blocks_ <= 1),
        in_place_(std::is_same_v<S, T> && width_ == n_.D && !p.packing.queries),
        dq_row_(in_place_ ? p.dq.row : width_), head_rows_(longest_queries(n_, p.packing)),
        batch_rows_(heads_ * group_ * head_rows_), set_rows_(batches_ * batch_rows_),
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
    tile.keys = arena.take(kBackwardKeys * width_);
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
      run_blocks(set, tile, rows);
      end_part(set);
    }
    for (int64_t index = 0; index < sets_; ++index) {  // what others have begun
      if (states_[index].next_block.load() >= blocks_) continue;
      states_[index].opened.await(1);
      run_blocks(set_at(index), tile, rows);
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
    T *keys_t, *values_t, *keys;  // K^T, V^T and K
    T *dk, *dv;
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

  // Sequences [b0, b0 + batches_) and heads of K and V [g0, g0 + heads_).
  struct Place {
    int64_t b0, g0;
  };

  // Keys from j0 on of head g of K and V of sequence b.
  struct Block {
    int64_t b, g, j0;
  };

  // A place, and what its queries keep.
  struct Set : Place {
    int64_t index;
    T* delta;  // [set_rows_]
    T* dq;     // [set_rows_, width_], if it is not summed in place
  };

  Place place_of(int64_t index) const {
    const int64_t wide = std::max<int64_t>(1, n_.N_kv / heads_);  // sets over the heads
    return {index / wide * batches_, index % wide * heads_};
  }

  Set set_at(int64_t index) const {
    const Place place = place_of(index);
    Arena<T> arena(kept_.get() + states_[index].slot * per_slot_);
    T* const delta = arena.take(set_rows_);
    const bool apart = p_.dq.data && !in_place_;
    return {place, index, delta, apart ? arena.take(set_rows_ * width_) : nullptr};
  }

  // Where the sums of dQ from query i on are, rows dq_row_ apart.
  T* dq_at(const Set& set, int64_t b, int64_t h, int64_t i) const {
    if (!in_place_) return set.dq + row_in(set, b, h, i) * width_;
    return reinterpret_cast<T*>(p_.dq.at(b, h, i));
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

  // The queries that see any of the first block of keys, which begins their rows of dQ.
  static Range opening_queries(const AttentionSizes& n) {
    if (n.S_k == 0) return {0, 0};
    return visible_queries(n, {0, n.S_q}, {0, std::min(kBackwardKeys, n.S_k)});
  }

  // Before any block of a set: delta, and zeros in the rows of dQ that the first does not begin.
  void open(const Set& set, const Rows& rows) const {
    for_heads(set, [&](int64_t b, int64_t h, int64_t queries, int64_t row) {
      if (single_) std::fill_n(set.delta + row, queries, T(0));  // for those that see no key
      for (int64_t i = 0; i < queries && !single_; i += kPanel<T>) {
        const int64_t count = std::min<int64_t>(kPanel<T>, queries - i);
        if (const int64_t later = i + 2 * kPanel<T>; later < queries) {
          const int64_t more = std::min<int64_t>(kPanel<T>, queries - later);
          fetch_rows(p_.dout.at(b, h, later), p_.dout.row, more, n_.D_v);
          fetch_rows(p_.out.at(b, h, later), p_.out.row, more, n_.D_v);
        }
        pack_panel(View<S>{p_.dout.at(b, h, i), 1, p_.dout.row}, n_.D_v, count, rows.douts);
        pack_panel(View<S>{p_.out.at(b, h, i), 1, p_.out.row}, n_.D_v, count, rows.dout_panels);
        multiply_lanes(rows.douts, rows.dout_panels, count, set.delta + row + i);
      }
      if (!p_.dq.data) return;
      const Range first = opening_queries(sequence(n_, p_.packing, b));
      T* const dq = dq_at(set, b, h, 0);
      for (const Range later : {Range{0, first.begin}, Range{first.end, queries}})
        for (int64_t i = later.begin; i < later.end; ++i)
          std::fill_n(dq + i * dq_row_, width_, T(0));
    });
  }

  // The blocks of a set that are left.
  void run_blocks(const Set& set, const Tile& tile, const Rows& rows) const {
    for (int64_t block; (block = states_[set.index].next_block.fetch_add(1)) < blocks_;) {
      run(block, set, tile, rows);
      end_part(set);
    }
  }

  // One block of a set has ended, or what its first thread had to do: the last to end brings what
  // is kept by query to where it is wanted.
  void end_part(const Set& set) const {
    if (states_[set.index].ended.fetch_add(1) < blocks_) return;
    if (!p_.dsinks && (in_place_ || !p_.dq.data)) return;
    for_heads(set, [&](int64_t b, int64_t h, int64_t queries, int64_t row) {
      if (p_.dsinks) sinks_.get()[b * n_.N + h] = sink_gradient(b, h, queries, set.delta + row);
      if (in_place_ || !p_.dq.data) return;
      write(set.dq + row * width_, queries, n_.D, width_, p_.dq.at(b, h, 0), p_.dq.row);
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

  // A block of the keys of the i-th head of K and V of a set.
  Block head_of(const Place& set, int64_t i, int64_t j0) const {
    return {set.b0 + i / heads_, set.g0 + i % heads_, j0};
  }

  // What likely follows a block: the next of its set, or the first of the set that is this thread's
  // if all take one in turn, or, after the last, one without keys.
  Block after(const Set& set, int64_t block) const {
    if (block + 1 < blocks_) return head_of(set, 0, (block + 1) * kBackwardKeys);
    const int64_t next = set.index + threads_, end = blocks_ * kBackwardKeys;
    return next < sets_ ? head_of(place_of(next), 0, 0) : head_of(set, 0, end);
  }

  // One block of the keys of all heads of a set.
  void run(int64_t block, const Set& set, const Tile& tile, const Rows& rows) const {
    Progress* const done = done_.get() + set.index * blocks_ + block;
    const int64_t j0 = block * kBackwardKeys, heads = batches_ * heads_;
    for (int64_t i = 0; i < heads; ++i)
      run_head(head_of(set, i, j0), i + 1 < heads ? head_of(set, i + 1, j0) : after(set, block),
               set, tile, rows, block ? done - 1 : nullptr, done);
    done->reach(std::numeric_limits<int64_t>::max());
  }

  // The share of a block of keys in the gradients of one head of K and V. A row of dQ is
  // `before`'s, the item of the block before, until it has been there.
  void run_head(const Block& block, const Block& next, const Set& set, const Tile& tile,
                const Rows& rows, const Progress* before, Progress* done) const {
    const auto [b, g, j0] = block;
    const AttentionSizes n = sequence(n_, p_.packing, b);
    const Range keys{j0, std::min(j0 + kBackwardKeys, n.S_k)};
    if (keys.size() <= 0) return;
    const View<S> k{p_.k.at(b, g, j0), p_.k.row, 1}, v{p_.v.at(b, g, j0), p_.v.row, 1};
    fetch_rows(k.data, k.row, keys.size(), n.D);
    fetch_rows(v.data, v.row, keys.size(), n.D_v);
    pack_alone<T>(k.transposed(), n.D, keys.size(), tile.keys_t);
    pack_alone<T>(v.transposed(), n.D_v, keys.size(), tile.values_t);
    pack_alone<T>(k, keys.size(), n.D, tile.keys);
    const Range all = visible_queries(n, {0, n.S_q}, keys);
    const int64_t step = even_tile(all.size());
    if (all.size() == 0) {
      std::fill_n(tile.dk, keys.size() * width_, T(0));
      std::fill_n(tile.dv, keys.size() * v_width_, T(0));
    }
    Ahead ahead;
    bool summed = false;  // whether dK and dV hold a tile's already
    for (int64_t h = g * group_; h < (g + 1) * group_; ++h) {
      for (int64_t i0 = all.begin; i0 < all.end; i0 += step) {
        const Range queries{i0, std::min(i0 + step, all.end)};
        const int64_t row = row_in(set, b, h, i0);
        T* const dq = p_.dq.data ? dq_at(set, b, h, i0) : nullptr;
        ahead.clear();
        if (dq) ahead.add(dq, dq_row_, queries.size(), n.D);
        if (queries.end < all.end) {
          add_tile(b, h, {queries.end, std::min(queries.end + step, all.end)}, &ahead);
        } else if (h + 1 < (g + 1) * group_) {
          add_tile(b, h + 1, all, &ahead);
        } else {
          if (p_.dk.data) ahead.add(p_.dk.at(b, g, j0), p_.dk.row, keys.size(), n.D);
          if (p_.dv.data) ahead.add(p_.dv.at(b, g, j0), p_.dv.row, keys.size(), n.D_v);
          add_block(next, &ahead);
        }
        ahead.divide(queries.size());
        weights(n, b, h, queries, keys, tile, set.delta + row, rows, &ahead);
        if (p_.dv.data)
          spread(n, queries, keys, rows.weights, rows.dout_panels, n.D_v, summed, tile.dv,
                 v_width_);
        if (p_.dk.data)
          spread(n, queries, keys, rows.dscores, rows.query_panels, n.D, summed, tile.dk, width_);
        summed = true;
        if (!dq) continue;
        if (before) before->await(row + queries.size());
        gather(n, queries, keys, rows.dscores, tile.keys, before != nullptr, dq);
        done->reach(row + queries.size());
      }
    }
    if (p_.dk.data) write(tile.dk, keys.size(), n.D, width_, p_.dk.at(b, g, j0), p_.dk.row);
    if (p_.dv.data) write(tile.dv, keys.size(), n.D_v, v_width_, p_.dv.at(b, g, j0), p_.dv.row);
  }

  // Queries a tile, of so many: as even as can be.
  static int64_t even_tile(int64_t queries) {
    const int64_t tiles = std::max<int64_t>(1, ceil_div(queries, kBackwardRows));
    return round_up(ceil_div(queries, tiles), kTileRows);
  }

  // P and dS of some queries by a block of keys.
  void weights(const AttentionSizes& n, int64_t b, int64_t h, Range queries, Range keys,
               const Tile& tile, T* deltas, const Rows& rows, Ahead* ahead) const {
    const int64_t count = queries.size();
    const View<S> q{p_.q.at(b, h, queries.begin), p_.q.row, 1};
    const View<S> dout{p_.dout.at(b, h, queries.begin), p_.dout.row, 1};
    pack_alone<T>(q, count, n_.D, rows.query_panels);
    pack_alone<T>(dout, count, n_.D_v, rows.dout_panels);
    score(n, queries, keys, widened(q, count, n.D, rows.queries), tile.keys_t, n.D, rows.weights);
    score(n, queries, keys, widened(dout, count, n.D_v, rows.douts), tile.values_t, n.D_v,
          rows.dscores);
    for (int64_t r = 0; r < count; ++r) {
      ahead->ask();
      weigh_row<kBackwardKeys>(p_, n, b, h, queries.begin + r, keys, deltas + r,
                               rows.weights + r * kTileLine, rows.dscores + r * kTileLine);
    }
  }

  // What the first tile of these queries reads.
  void add_tile(int64_t b, int64_t h, Range queries, Ahead* ahead) const {
    const int64_t count = std::min(even_tile(queries.size()), queries.size());
    ahead->add(p_.q.at(b, h, queries.begin), p_.q.row, count, n_.D);
    ahead->add(p_.dout.at(b, h, queries.begin), p_.dout.row, count, n_.D_v);
  }

  // What a block of keys begins with, if there is one.
  void add_block(const Block& block, Ahead* ahead) const {
    const AttentionSizes n = sequence(n_, p_.packing, block.b);
    const Range keys{block.j0, std::min(block.j0 + kBackwardKeys, n.S_k)};
    if (keys.size() <= 0) return;
    ahead->add(p_.k.at(block.b, block.g, block.j0), p_.k.row, keys.size(), n_.D);
    ahead->add(p_.v.at(block.b, block.g, block.j0), p_.v.row, keys.size(), n_.D_v);
    add_tile(block.b, block.g * group_, visible_queries(n, {0, n.S_q}, keys), ahead);
  }

  // Of the products below, only what the causal rule and the window leave: all at once where that
  // is everything, else the parts of each panel or few rows.

  // to [queries, keys] = the products of rows with keys packed in panels.
  static void score(const AttentionSizes& n, Range queries, Range keys, const T* from,
                    const T* panels, int64_t depth, T* to) {
    const int64_t step = all_visible(n, queries, keys) ? keys.size() : kPanel<T>;
    for (int64_t j = 0; j < keys.size(); j += step) {
      const int64_t count = std::min(step, keys.size() - j);
      const Range seen = visible_queries(n, queries, {keys.begin + j, keys.begin + j + count});
      multiply_in_chains(seen.size(), count, depth, from + seen.begin * depth, panels + j * depth,
                         to + seen.begin * kTileLine + j, kTileLine);
    }
  }

  // to [keys, columns] = what each key has from the queries that see it, packed in panels, or with
  // `accumulate` += that.
  static void spread(const AttentionSizes& n, Range queries, Range keys, const T* weights,
                     const T* panels, int64_t columns, bool accumulate, T* to, int64_t to_row) {
    for_parts(all_visible(n, queries, keys), keys.size(), [&](int64_t j, int64_t count) {
      const Range seen = visible_queries(n, queries, {keys.begin + j, keys.begin + j + count});
      multiply(count, columns, seen.size(), weights + seen.begin * kTileLine + j, 1, kTileLine,
               panels + seen.begin * kPanel<T>, queries.size(), accumulate, to + j * to_row,
               to_row);
    });
  }

  // dQ = dS K, or with `accumulate` dQ += dS K.
  void gather(const AttentionSizes& n, Range queries, Range keys, const T* dscores, const T* panels,
              bool accumulate, T* dq) const {
    for_parts(all_visible(n, queries, keys), queries.size(), [&](int64_t r, int64_t count) {
      const Range seen = visible_keys(n, {queries.begin + r, queries.begin + r + count}, keys);
      multiply(count, n.D, seen.size(), dscores + r * kTileLine + seen.begin, kTileLine, 1,
               panels + seen.begin * kPanel<T>, keys.size(), accumulate, dq + r * dq_row_, dq_row_);
    });
  }

  // Runs body(row, count) for all rows at once, or for kEdgeRows at a time.
  template <class Body>
  static void for_parts(bool whole, int64_t rows, const Body& body) {
    const int64_t step = whole ? rows : kEdgeRows;
    for (int64_t r = 0; r < rows; r += step) body(r, std::min(step, rows - r));
  }

  static void write(const T* from, int64_t rows, int64_t columns, int64_t from_row, S* to,
                    int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < columns; d += lanes<T>)
        store_n(to + i * to_row + d, load(from + i * from_row + d), columns - d);
  }

  const AttentionBackward<S>& p_;
  const AttentionSizes& n_;
  const int threads_;
  const int64_t group_;
  const int64_t batches_, heads_;  // sequences and heads of K and V that one item goes through
  const int64_t width_, v_width_, blocks_;
  const bool single_;                                // all keys of a query are in one block
  const bool in_place_;                              // dQ is summed where it is wanted
  const int64_t dq_row_;                             // from one row of these sums to the next
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
