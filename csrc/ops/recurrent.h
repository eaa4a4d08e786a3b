// What rnn, gru and lstm share: a pass over a sequence forward, and back through time, around a
// cell.
//
// Forward, the input product W_ih x_t of many steps at once, then the steps. Backward, the steps,
// then the large products dx, dW_ih, dW_hh over all steps at once; dx of a linked pass after each
// few.
#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "../core/gemm.h"
#include "../core/recurrence.h"
#include "../core/units.h"

namespace pykernels {

struct RecurrentSizes {
  int64_t T, B, I, H;
  int64_t R;  // columns of y: H, or the size that an lstm projects to
};

// Where a pass of several stands that run side by side, each on one thread: what it reads another
// may be making, and what it makes another may read. By the steps of their walks, which are alike.
struct Link {
  const Progress* source = nullptr;
  Progress* done = nullptr;

  explicit operator bool() const { return source || done; }
  void await(int64_t step) const {
    if (source) source->await(step);
  }
  void reach(int64_t step) const {
    if (done) done->reach(step);
  }
};

// Rows of the steps that a linked pass takes at a time: the fewer, the sooner the next can start.
constexpr int64_t kLinkedRows = 2 * kTileRows;

// Row-major and contiguous, stored as S. Rows lie as `walk` has them, N in all; G is the number of
// gates of the op.
template <class S>
struct RecurrentForward {
  RecurrentSizes sizes;
  Walk walk;
  Link link;
  const S* x;     // [N, I]
  const S* w_ih;  // [G H, I]
  const S* w_hh;  // [G H, R]
  const S* b_ih;  // [G H] or nullptr
  const S* b_hh;  // [G H] or nullptr
  const S* h0;    // [B, R] or nullptr for zeros
  const S* w_hr;  // [R, H] or nullptr for none
  // The weights and biases as pack_forward leaves them; nullptr to have that done in this call.
  const compute_t<S>* packed;
  S* y;    // [N, R], out
  S* h_n;  // [B, R] or nullptr, out
};

// A gradient that is not wanted is nullptr.
template <class S>
struct RecurrentBackward {
  RecurrentSizes sizes;
  Walk walk;  // of the forward pass
  Link link;
  const S* x;
  const S* w_ih;
  const S* w_hh;
  const S* h0;
  const S* w_hr;
  const S* y;     // of the forward pass
  const S* dy;    // [N, R] or nullptr for zeros
  const S* dh_n;  // [B, R] or nullptr for zeros
  S* dx;          // [N, I]
  S* dw_ih;       // [G H, I]
  S* dw_hh;       // [G H, R]
  S* db_ih;       // [G H]
  S* db_hh;       // [G H]
  S* dh0;         // [B, R]
  S* dw_hr;       // [R, H]
};

// values [count] as T: themselves where that is how they are stored, a widened copy otherwise.
template <class T, class S>
class Widened {
 public:
  Widened(const S* values, int64_t count) : copy_(kSame || !values ? 0 : count) {
    if constexpr (kSame) {
      data_ = values;
    } else {
      for (int64_t i = 0; values && i < count; ++i) copy_.get()[i] = widen(values[i]);
      data_ = copy_.get();
    }
  }
  const T* get() const { return data_; }

 private:
  static constexpr bool kSame = std::is_same_v<T, S>;
  Scratch<T> copy_;
  const T* data_;
};

// A buffer of T for results stored as S: the results' own memory where the two are the same.
template <class T, class S>
class Result {
 public:
  Result(S* to, int64_t count) : to_(to), count_(count), scratch_(kSame || !to ? 0 : count) {}
  T* get() const {
    if constexpr (kSame) return to_;
    else return scratch_.get();
  }
  // Rounds some of them to S.
  void narrow(Range part) const {
    if constexpr (!kSame) {
      if (!to_) return;
      for (int64_t i = part.begin; i < part.end; i += lanes<T>)
        store_n(to_ + i, load_n(scratch_.get() + i, part.end - i), part.end - i);
    }
  }
  // This thread's share of rounding all, once the team has met.
  void narrow_share(const Team& team) const { narrow(team.share(count_, lanes<T>)); }

 private:
  static constexpr bool kSame = std::is_same_v<T, S>;
  S* const to_;
  const int64_t count_;
  const Scratch<T> scratch_;
};

// sums[j] = sum over i of values[i, j] [rows, columns]; this thread's columns. Partial sums of 64
// rows keep the rounding of a long sum down; several lines of a row at a time, as rows may lie a
// page apart.
template <class T>
void sum_rows(const Team& team, const T* values, int64_t rows, int64_t columns, T* sums) {
  constexpr int64_t block = 64;
  constexpr int wide = 8, width = wide * lanes<T>;
  const Range mine = team.share(columns, width);
  for (int64_t j = mine.begin; j < mine.end; j += width) {
    const int64_t count = mine.end - j;
    vec<T> total[wide] = {};
    for (int64_t i0 = 0; i0 < rows; i0 += block) {
      vec<T> partial[wide] = {};
      for (int64_t i = i0; i < std::min(rows, i0 + block); ++i)
#pragma GCC unroll 8
        for (int x = 0; x < wide; ++x)
          partial[x] += load_n(values + i * columns + j + x * lanes<T>, count - x * lanes<T>);
#pragma GCC unroll 8
      for (int x = 0; x < wide; ++x) total[x] += partial[x];
    }
#pragma GCC unroll 8
    for (int x = 0; x < wide; ++x) store_n(sums + j + x * lanes<T>, total[x], count - x * lanes<T>);
  }
}

// Values between two rows of gates in blocks, `gates` panels to a block: at least `size`, and
// such that the rows of a step do not all compete for the same few places in the first-level cache,
// as rows a multiple of 2 KB apart do.
template <class T>
int64_t spread_rows(int64_t size, int64_t gates) {
  return size * int64_t(sizeof(T)) % 2048 == 0 ? size + gates * kPanel<T> : size;
}

// For products whose finish reads nothing that would have to be fetched.
constexpr auto nothing = [](int64_t, int64_t) {};

// Multiply-adds from which a pass is worth waking a team.
constexpr int64_t kShareablePass = 200000;

// How many threads run a pass of `products` products of all rows with weights of this size.
inline int team_for(int threads, const RecurrentSizes& n, int64_t rows, int64_t gates,
                    int64_t products) {
  return rows * gates * n.H * (n.I + n.R) * products < kShareablePass ? 1 : threads;
}

// A pass that is ready to run, with all the memory that it will need.
class Pass {
 public:
  virtual ~Pass() = default;
  virtual int threads() const = 0;  // that are to run it
  virtual void run(const Team& team) = 0;
  virtual void finish() {}  // once the team is done
};

// ---- packed weights -----------------------------------------------------------------------------

// Where in one buffer the parts of a forward pass's packed weights are. Cell has
//
//   static kGates       gates of a unit
//   static kBiases      biases of a unit: b_ih + b_hh of each gate. Where that is one more than
//                       gates, the two biases of the last gate stay apart, b_ih first
template <class T, class Cell>
struct PackedLayout {
  int64_t w_ih, w_hh, w_hr, bias, size;

  PackedLayout(const RecurrentSizes& n, bool projection) {
    w_ih = 0;
    w_hh = w_ih + gates_size<T>(Cell::kGates, n.H, n.I);
    w_hr = w_hh + gates_size<T>(Cell::kGates, n.H, n.R);
    bias = w_hr + (projection ? gates_size<T>(1, n.R, n.H) : 0);
    size = bias + gates_size<T>(Cell::kBiases, n.H, 1);
  }
};

// This thread's share of packing the weights of `p` for forward passes of Cell.
template <class Cell, class T, class S>
void pack_forward(const Team& team, const RecurrentForward<S>& p, T* to) {
  constexpr int kGates = Cell::kGates, kBiases = Cell::kBiases;
  const RecurrentSizes& n = p.sizes;
  const PackedLayout<T, Cell> at(n, p.w_hr);
  pack_gates<T>(team, View<S>{p.w_ih, n.I, 1}, kGates, n.H, n.I, to + at.w_ih);
  pack_gates<T>(team, View<S>{p.w_hh, n.R, 1}, kGates, n.H, n.R, to + at.w_hh);
  if (p.w_hr) pack_gates<T>(team, View<S>{p.w_hr, n.H, 1}, 1, n.R, n.H, to + at.w_hr);
  if (team.rank > 0) return;
  for (int gate = 0; gate < kBiases; ++gate) {
    const int g = std::min(gate, kGates - 1);
    const bool apart = kBiases > kGates && g == kGates - 1;
    const S* const ih = apart && gate == kGates ? nullptr : p.b_ih;
    const S* const hh = apart && gate < kGates ? nullptr : p.b_hh;
    for (int64_t u = 0; u < n.H; ++u)
      to[at.bias + gate_at<T>(kBiases, u) + gate * kPanel<T>] =
          T(ih ? widen(ih[g * n.H + u]) : 0) + T(hh ? widen(hh[g * n.H + u]) : 0);
  }
}

// ---- forward ------------------------------------------------------------------------------------

// Where a cell finds itself in a forward pass.
template <class T>
struct ForwardStep {
  int64_t first;    // row of all rows at which the step's rows begin
  int64_t carried;  // rows of the step whose state before it is in `before`; the others' is in h0
  const T* before;  // [carried, R]
  const T* h0;      // [B, R] or nullptr
  const T* input;   // [rows, input_row]: W_ih x_t, the gates in blocks
  int64_t input_row;
  const T* bias;  // the biases in blocks
};

// Cell has, beside what PackedLayout asks for,
//   T* unprojected           [N, H] where states before a projection are kept, or nullptr
//   void fetch(step, row, unit)
//                            asks for what `state` will read of a panel of units
//   void gates(step, row, unit, count, product)
//                            those of some units that do not wait for another; `product` is
//                            W_hh h_{t-1} of their gates, kPanel apart, and may be written to
//   Units<T> state(step, row, unit, count, product)
//                            then their state, before a projection, of what `gates` has left
template <class S, class Cell>
class ForwardPass : public Pass {
  using T = compute_t<S>;
  static constexpr bool kSame = std::is_same_v<T, S>;
  static constexpr int kGates = Cell::kGates;

 public:
  ForwardPass(int threads, const RecurrentForward<S>& p, const Cell& cell)
      : threads_(team_for(threads, p.sizes, p.walk.total(), kGates, 1)), p_(p), n_(p.sizes),
        walk_(p.walk), cell_(cell), layout_(p.sizes, p.w_hr), packed_(p.packed ? 0 : layout_.size),
        weights_(p.packed ? p.packed : packed_.get()),
        // No more steps than there are: a thread's rows begin that many steps of others' further
        // on.
        chunk_(std::clamp<int64_t>(
            (p.link ? kLinkedRows : threads_ * kStepRows) / std::max<int64_t>(1, n_.B), 1,
            std::max<int64_t>(1, n_.T))),
        chunk_rows_(std::min(walk_.total(), chunk_ * n_.B)),
        input_row_(spread_rows<T>(gates_size<T>(kGates, n_.H, 1), kGates)),
        inputs_(2 * chunk_rows_ * input_row_), x_(threads_ * kStepRows * n_.I),
        h0_(p.h0, n_.B * n_.R), unprojected_(p.w_hr && !cell.unprojected ? n_.B * n_.H : 0),
        states_(kSame ? 0 : 2 * n_.B * n_.R) {}

  int threads() const override { return threads_; }

  void run(const Team& team) override {
    if (!p_.packed) {
      pack_forward<Cell>(team, p_, packed_.get());
      team.wait();
    }
    StepShare share(team, walk_, n_.R, kGates * n_.H, kGates * kPanel<T>);
    if (share.small()) return run_small(team, share);
    for (int64_t begin = 0; begin < n_.T && !share.idle(); begin += chunk_) {
      // A thread prepares what it will read itself: no meeting.
      const Chunk chunk = share.by_rows() ? chunk_of(begin, share.all_rows()) : chunk_of(begin);
      const Range blocks = share.blocks(ceil_div(n_.H, kPanel<T>));
      for (int64_t i = 0; i < chunk.count; i += kStepRows) multiply_input(team, chunk, i, blocks);
      steps(share, chunk);
    }
  }

  // Once the team is done: h_n, each sequence's last state.
  void finish() override {
    for (int64_t b = 0; p_.h_n && b < n_.B; ++b) {
      S* const to = p_.h_n + b * n_.R;
      if (n_.T > 0) {
        // The last step of a sequence in either direction.
        int64_t time = 0;
        if (!walk_.reverse)
          for (time = n_.T - 1; walk_.start(time + 1) - walk_.start(time) <= b; --time) {
          }
        std::memcpy(static_cast<void*>(to), p_.y + (walk_.start(time) + b) * n_.R,
                    n_.R * sizeof(S));
      } else {
        for (int64_t r = 0; r < n_.R; ++r)
          if (p_.h0) to[r] = p_.h0[b * n_.R + r];
          else narrow(T(0), &to[r]);
      }
    }
  }

 private:
  // Steps [begin, end), whose input products W_ih x are computed ahead of them, row after row to
  // `inputs`: of `each` rows of every step where threads split the rows, or of all their rows,
  // which lie side by side.
  struct Chunk {
    int64_t begin, end;
    int64_t first, each, apart;  // row i is first + (i / each) * apart + i % each
    int64_t count;
    T* inputs;

    int64_t row(int64_t i) const { return first + i / each * apart + i % each; }
  };

  Chunk chunk_of(int64_t begin) const {
    const int64_t end = std::min(n_.T, begin + chunk_);
    const Range rows = walk_.span(begin, end);
    // Two in turn, as run_small prepares one beside the steps of the other.
    T* const inputs = inputs_.get() + (begin / chunk_ & 1) * chunk_rows_ * input_row_;
    return {begin, end, rows.begin, std::max<int64_t>(1, rows.size()), 0, rows.size(), inputs};
  }
  // `rows` of every step of a dense batch.
  Chunk chunk_of(int64_t begin, Range rows) const {
    const int64_t end = std::min(n_.T, begin + chunk_);
    return {begin,
            end,
            walk_.first(begin) + rows.begin,
            std::max<int64_t>(1, rows.size()),
            walk_.reverse ? -n_.B : n_.B,
            (end - begin) * rows.size(),
            inputs_.get() + chunk_ * rows.begin * input_row_};
  }

  // W_ih x for up to kStepRows rows of a chunk, from its i-th.
  void multiply_input(const Team& team, const Chunk& chunk, int64_t i, Range blocks) const {
    constexpr int64_t width = kPanel<T>;
    const int64_t count = std::min(kStepRows, chunk.count - i);
    const T* const w_ih = weights_ + layout_.w_ih;
    T* const copy = x_.get() + team.rank * kStepRows * n_.I;
    const T* x = copy;
    if (kSame && chunk.apart == 0) {
      x = reinterpret_cast<const T*>(p_.x) + chunk.row(i) * n_.I;
    } else {
      for (int64_t r = 0; r < count; ++r) {
        const S* const from = p_.x + chunk.row(i + r) * n_.I;
        for (int64_t k = 0; k < n_.I; ++k) copy[r * n_.I + k] = widen(from[k]);
      }
    }
    for (int64_t k = 0; k < n_.I; k += kDepth<T>)
      for_each_tile_column(
          {0, count}, {blocks.begin * kGates, blocks.end * kGates},
          [&](int64_t r, int64_t tiles, int64_t height, int64_t panel, int64_t wide) {
            multiply_tile(height, wide, std::min(kDepth<T>, n_.I - k), x + r * n_.I + k, n_.I, 1,
                          w_ih + (panel * n_.I + k) * width, n_.I * width, width, k > 0,
                          chunk.inputs + (i + r) * input_row_ + panel * width, input_row_, tiles,
                          height * n_.I);
          });
  }

  // Steps so small that one thread runs them all. Meanwhile the others prepare the input products
  // of the chunk after, in pieces that whoever is free takes.
  void run_small(const Team& team, StepShare& share) {
    const Range blocks{0, ceil_div(n_.H, kPanel<T>)};
    int64_t piece = pieces_.fetch_add(1), pieces = 0;  // mine; of the chunks before
    for (int64_t begin = -chunk_; begin < n_.T; begin += chunk_) {
      if (begin >= 0 && !share.idle()) {
        const Chunk chunk = chunk_of(begin);
        steps(share, chunk);
        p_.link.reach(chunk.end);
      }
      if (begin + chunk_ >= n_.T) return;
      const Chunk next = chunk_of(begin + chunk_);
      p_.link.await(next.end);
      const int64_t all = pieces + ceil_div(next.count, kStepRows);
      for (; piece < all; piece = pieces_.fetch_add(1))
        multiply_input(team, next, (piece - pieces) * kStepRows, blocks);
      pieces = all;
      team.wait();
    }
  }

  void steps(StepShare& share, const Chunk& chunk) const {
    const T* const w_hh = weights_ + layout_.w_hh;
    const T* const w_hr = weights_ + layout_.w_hr;
    const int64_t all_blocks = ceil_div(n_.H, kPanel<T>), all_out = ceil_div(n_.R, kPanel<T>);
    for (int64_t s = chunk.begin; s < chunk.end && !share.idle(); ++s) {
      const Range rows = share.rows(s), blocks = share.blocks(all_blocks);
      const int64_t input =
          chunk.apart ? (s - chunk.begin) * chunk.each - rows.begin : walk_.first(s) - chunk.first;
      const ForwardStep<T> step{walk_.first(s),
                                walk_.carried(s),
                                s > 0 ? states(s - 1) : nullptr,
                                h0_.get(),
                                chunk.inputs + input * input_row_,
                                input_row_,
                                weights_ + layout_.bias};
      // What the innermost loops read, by value: see finish_tile.
      const int64_t H = n_.H, R = n_.R;
      const bool projects = p_.w_hr;
      const Cell cell = cell_;
      T* const unprojected =
          cell.unprojected ? cell.unprojected + step.first * H : unprojected_.get();
      const auto keep = [R, to = states(s), y = p_.y + step.first * R](
                            int64_t row, int64_t unit, int64_t count, Units<T> state) {
        store_units(to + row * R + unit, state, count);
        if constexpr (kSame) (void)y;
        else store_units(y + row * R + unit, state, count);
      };
      const auto fetch = [=](int64_t row, int64_t unit) { cell.fetch(step, row, unit); };
      const auto gates = [=](int64_t row, int64_t unit, int64_t count, T* product) {
        cell.gates(step, row, unit, count, product);
      };
      const auto finish = [=](int64_t row, int64_t unit, int64_t count, const T* product) {
        const Units<T> state = cell.state(step, row, unit, count, product);
        if (projects) store_units(unprojected + row * H + unit, state, count);
        else keep(row, unit, count, state);
      };
      const auto multiply = [&](Range part, const T* before) {
        multiply_gates<T, kGates>(part, blocks, H, R, before, R, w_hh, s & 1, fetch, gates, finish);
      };
      multiply({rows.begin, std::min(rows.end, step.carried)}, step.before);
      multiply({std::max(rows.begin, step.carried), rows.end}, h0_.get());
      share.meet();
      if (!projects) continue;
      if (share.idle()) return;
      multiply_gates<T, 1>(rows, share.blocks(all_out), R, H, unprojected, H, w_hr, s & 1, nothing,
                           [=](int64_t row, int64_t unit, int64_t count, const T* product) {
                             keep(row, unit, count, load_units(product));
                           });
      share.meet();
    }
  }

  // The states of step s as T, [rows, R]: y itself, or where y is 16 bits wide, the last two steps.
  T* states(int64_t s) const {
    if constexpr (kSame) return p_.y + walk_.first(s) * n_.R;
    else return states_.get() + (s & 1) * n_.B * n_.R;
  }

  const int threads_;
  const RecurrentForward<S> p_;
  const RecurrentSizes n_;
  const Walk walk_;
  const Cell cell_;
  const PackedLayout<T, Cell> layout_;
  const Scratch<T> packed_;
  const T* const weights_;
  const int64_t chunk_, chunk_rows_;  // steps of a chunk, and its rows at the most
  const int64_t input_row_;           // values between two rows of input products
  const Scratch<T> inputs_, x_;
  const Widened<T, S> h0_;
  const Scratch<T> unprojected_, states_;
  std::atomic<int64_t> pieces_{0};  // of the input product, claimed so far
};

// ---- backward -----------------------------------------------------------------------------------

// Where a cell finds itself on the way back.
struct BackwardStep {
  int64_t first;             // row of all rows at which the step's rows begin
  int64_t carried;           // rows that had a step after this one; the others' last step this was
  int64_t before, n_before;  // the first row of the step before, and rows of it that were in it
};

// Columns of delta that belong to rows of W_ih: gates may come in another order there.
struct DeltaPiece {
  int64_t column, count, gate_row;
};

// Cell has
//   static kGates            gates of a unit
//   int64_t delta_row        values between two rows of delta
//   T* unprojected           of the forward pass
//   void fetch(step, row, unit)
//                            asks for what `delta` will read of a panel of units
//   void delta(step, row, unit, count, dh, to)
//                            from the gradient of the state of some units, that of their gates
//   Units<T> rest(row, unit, count)
//                            what dh0 gets beside W_hh^T delta
//   std::array<DeltaPiece, n> pieces() const
// where the first G H columns of delta meet W_hh.
template <class S, class Cell>
class BackwardPass : public Pass {
  using T = compute_t<S>;
  static constexpr int kGates = Cell::kGates;

 public:
  BackwardPass(int threads, const RecurrentBackward<S>& p, const Cell& cell)
      : threads_(team_for(threads, p.sizes, p.walk.total(), kGates, 2)), p_(p), n_(p.sizes),
        walk_(p.walk.back()), cell_(cell), rows_(walk_.total()), delta_(rows_ * cell.delta_row),
        w_hh_(gates_size<T>(1, n_.R, kGates * n_.H)),
        w_hr_(p.w_hr ? gates_size<T>(1, n_.H, n_.R) : 0), dstate_(p.w_hr ? rows_ * n_.R : 0),
        // Where sequences end at different steps, what was before a row is no fixed distance away.
        before_(p.walk.offsets && p.dw_hh ? rows_ * n_.R : 0),
        chunk_(std::max<int64_t>(1, p.link ? kLinkedRows / std::max<int64_t>(1, n_.B) : n_.T)),
        w_ih_(p.link.done ? input_weights() : 0),
        first_(p.walk.offsets && p.walk.reverse && p.dh0 ? n_.B * kGates * n_.H : 0),
        dx_(p.dx, rows_ * n_.I), dw_ih_(p.dw_ih, kGates * n_.H * n_.I),
        dw_hh_(p.dw_hh, kGates * n_.H * n_.R), biases_(p.db_ih || p.db_hh ? cell.delta_row : 0),
        dh0_(p.dh0, n_.B * n_.R), dw_hr_(p.dw_hr, n_.R * n_.H),
        product_(threads_, std::max({n_.I, n_.R, n_.H}), std::max(rows_, kGates * n_.H)) {}

  int threads() const override { return threads_; }

  void run(const Team& team) override {
    pack_gates<T>(team, View<S>{p_.w_hh, 1, n_.R}, 1, n_.R, kGates * n_.H, w_hh_.get());
    if (p_.w_hr) pack_gates<T>(team, View<S>{p_.w_hr, 1, n_.H}, 1, n_.H, n_.R, w_hr_.get());
    if (p_.link.done) pack_input_weights();
    team.wait();
    walk(team);
    team.wait();
    products(team);
    team.wait();
    if (!p_.link.done) dx_.narrow_share(team);  // or else the walk has done so
    dw_ih_.narrow_share(team);
    dw_hh_.narrow_share(team);
    if (team.rank == 0) bias_gradients();
    dh0_.narrow_share(team);
    dw_hr_.narrow_share(team);
  }

 private:
  // Values that pack_input_weights writes.
  int64_t input_weights() const {
    int64_t size = 0;
    for (const DeltaPiece& piece : cell_.pieces()) size += gates_size<T>(1, n_.I, piece.count);
    return size;
  }

  void walk(const Team& team) const {
    StepShare share(team, walk_, kGates * n_.H, n_.R, kPanel<T>);
    for (int64_t begin = 0; begin < n_.T && !share.idle(); begin += chunk_) {
      const int64_t end = std::min(n_.T, begin + chunk_);
      p_.link.await(end);
      steps(share, begin, end);
      if (p_.link.done) input_gradient(walk_.span(begin, end));
      p_.link.reach(end);
    }
    if (p_.dh0 && !share.idle()) first_gradient(team, share);
  }

  void steps(StepShare& share, int64_t begin, int64_t end) const {
    const Walk forward = walk_.back();
    const int64_t row_size = cell_.delta_row;
    const int64_t all_blocks = ceil_div(n_.H, kPanel<T>), all_out = ceil_div(n_.R, kPanel<T>);
    for (int64_t s = begin; s < end && !share.idle(); ++s) {
      const int64_t s_forward = n_.T - 1 - s;
      const BackwardStep step{walk_.first(s), walk_.carried(s),
                              s_forward > 0 ? forward.first(s_forward - 1) : 0,
                              forward.carried(s_forward)};
      const Range rows = share.rows(s), out_blocks = share.blocks(all_out);
      const Range old{rows.begin, std::min(rows.end, step.carried)};
      const Range fresh{std::max(rows.begin, step.carried), rows.end};
      const T* const after = s > 0 ? delta_.get() + walk_.first(s - 1) * row_size : nullptr;
      T* const delta = delta_.get() + step.first * row_size;
      T* const dstate = p_.w_hr ? dstate_.get() + step.first * n_.R : nullptr;
      // What the innermost loops read, by value: see finish_tile.
      const int64_t R = n_.R;
      const bool projects = p_.w_hr;
      const Cell cell = cell_;
      const S* const dy = p_.dy ? p_.dy + step.first * R : nullptr;
      const S* const dh_n = p_.dh_n;
      const auto finish = [=](int64_t row, int64_t unit, int64_t count, const T* product) {
        Units<T> dh = load_units(product);
        const int64_t at = row * R + unit;
        if (dy) dh += load_units(dy + at, count);
        if (dh_n && row >= step.carried) dh += load_units(dh_n + at, count);
        if (projects) store_units(dstate + at, dh, count);
        else cell.delta(step, row, unit, count, dh, delta + row * row_size + unit);
      };
      const auto fetch = [=](int64_t row, int64_t unit) {
        if (dy) prefetch(dy + row * R + unit);
        if (!projects) cell.fetch(step, row, unit);
      };
      multiply_gates<T, 1>(old, out_blocks, n_.R, kGates * n_.H, after, row_size, w_hh_.get(),
                           s & 1, fetch, finish);
      multiply_gates<T, 1>(fresh, out_blocks, n_.R, kGates * n_.H, nullptr, row_size, w_hh_.get(),
                           s & 1, fetch, finish);
      share.meet();
      if (!p_.w_hr) continue;
      if (share.idle()) return;
      multiply_gates<T, 1>(
          rows, share.blocks(all_blocks), n_.H, n_.R, dstate, n_.R, w_hr_.get(), s & 1,
          [&](int64_t row, int64_t unit) { cell_.fetch(step, row, unit); },
          [&](int64_t row, int64_t unit, int64_t count, const T* product) {
            cell_.delta(step, row, unit, count, load_units(product), delta + row * row_size + unit);
          });
      share.meet();
    }
  }

  // dh0, from the gates of the first steps.
  void first_gradient(const Team& team, StepShare& share) const {
    const Walk forward = walk_.back();
    const int64_t row_size = cell_.delta_row, all_out = ceil_div(n_.R, kPanel<T>);
    // The first step of each sequence: one and the same, but in a ragged batch that ran backwards.
    const T* first = delta_.get() + (n_.T > 0 ? walk_.first(n_.T - 1) * row_size : 0);
    int64_t first_row = row_size;
    if (first_.get()) {
      first = first_.get();
      first_row = kGates * n_.H;
      for (int64_t s = 0; s < n_.T && team.rank == 0; ++s)
        for (int64_t b = forward.carried(s); b < forward.rows(s); ++b)
          std::copy_n(delta_.get() + (forward.first(s) + b) * row_size, first_row,
                      first_.get() + b * first_row);
      share.meet();
      if (share.idle()) return;
    }
    multiply_gates<T, 1>(share.all_rows(), share.blocks(all_out), n_.R, kGates * n_.H,
                         n_.T > 0 ? first : nullptr, first_row, w_hh_.get(), false, nothing,
                         [&](int64_t row, int64_t unit, int64_t count, const T* product) {
                           Units<T> dh = load_units(product) + cell_.rest(row, unit, count);
                           if (n_.T == 0 && p_.dh_n)
                             dh += load_units(p_.dh_n + row * n_.R + unit, count);
                           store_units(dh0_.get() + row * n_.R + unit, dh, count);
                         });
  }

  // W_ih as input_gradient reads it.
  void pack_input_weights() const {
    T* to = w_ih_.get();
    for (const DeltaPiece& piece : cell_.pieces()) {
      pack_gates<T>(Team{0, 1, nullptr}, View<S>{p_.w_ih + piece.gate_row * n_.I, 1, n_.I}, 1, n_.I,
                    piece.count, to);
      to += gates_size<T>(1, n_.I, piece.count);
    }
  }

  // dx of some rows, for a pass that waits for it.
  void input_gradient(Range rows) const {
    const T* w_ih = w_ih_.get();
    for (const DeltaPiece& piece : cell_.pieces()) {
      multiply_gates<T, 1>(rows, {0, ceil_div(n_.I, kPanel<T>)}, n_.I, piece.count,
                           delta_.get() + piece.column, cell_.delta_row, w_ih, false, nothing,
                           [&](int64_t row, int64_t unit, int64_t count, const T* product) {
                             T* const to = dx_.get() + row * n_.I + unit;
                             const Units<T> before =
                                 w_ih == w_ih_.get() ? Units<T>{} : load_units(to, count);
                             store_units(to, before + load_units(product), count);
                           });
      w_ih += gates_size<T>(1, n_.I, piece.count);
    }
    dx_.narrow({rows.begin * n_.I, rows.end * n_.I});
  }

  // Rounds the sums of delta to the biases' gradients, once the team has met.
  void bias_gradients() const {
    const auto put = [&](int64_t column, int64_t count, S* to) {
      for (int64_t i = 0; i < count; i += lanes<T>)
        store_n(to + i, load_n(biases_.get() + column + i, count - i), count - i);
    };
    if (p_.db_hh) put(0, kGates * n_.H, p_.db_hh);
    for (const DeltaPiece& piece : cell_.pieces())
      if (p_.db_ih) put(piece.column, piece.count, p_.db_ih + piece.gate_row);
  }

  // dx, the weights' gradients, and the sums of the biases'.
  void products(const Team& team) const {
    const int64_t row = cell_.delta_row;
    bool first = true;
    for (const DeltaPiece& piece : cell_.pieces()) {
      const View<T> part{delta_.get() + piece.column, row, 1};
      if (p_.dx && !p_.link.done)
        product_.run(team, {rows_, n_.I, piece.count}, part,
                     View<S>{p_.w_ih + piece.gate_row * n_.I, n_.I, 1}, !first, dx_.get(), n_.I);
      if (p_.dw_ih)
        product_.run(team, {piece.count, n_.I, rows_}, part.transposed(), View<S>{p_.x, n_.I, 1},
                     false, dw_ih_.get() + piece.gate_row * n_.I, n_.I);
      first = false;
    }
    if (biases_.get()) sum_rows(team, delta_.get(), rows_, row, biases_.get());
    if (p_.dw_hr)
      product_.run(team, {n_.R, n_.H, rows_}, View<T>{dstate_.get(), 1, n_.R},
                   View<T>{cell_.unprojected, n_.H, 1}, false, dw_hr_.get(), n_.H);
    if (p_.dw_hh) recurrent_gradient(team);
  }

  // dW_hh = sum of delta_t h_{t-1}^T.
  void recurrent_gradient(const Team& team) const {
    const int64_t row = cell_.delta_row, gates = kGates * n_.H;
    const auto add = [&](int64_t begin, int64_t count, const S* before, bool accumulate) {
      product_.run(team, {gates, n_.R, count}, View<T>{delta_.get() + begin * row, 1, row},
                   View<S>{before, n_.R, 1}, accumulate, dw_hh_.get(), n_.R);
    };
    const Walk forward = walk_.back();
    if (before_.get()) {
      const Range mine = team.share(n_.T);
      for (int64_t s = mine.begin; s < mine.end; ++s) {
        S* const to = before_.get() + forward.first(s) * n_.R;
        const int64_t carried = forward.carried(s) * n_.R, all = forward.rows(s) * n_.R;
        if (s > 0) std::copy_n(p_.y + forward.first(s - 1) * n_.R, carried, to);
        if (p_.h0) std::copy_n(p_.h0 + carried, all - carried, to + carried);
        else std::fill(to + carried, to + all, S{});
      }
      team.wait();
      return add(0, rows_, before_.get(), false);
    }
    // A dense batch: h_{t-1} is a step away, but for the first step.
    const int64_t later = n_.T > 0 ? rows_ - n_.B : 0;
    add(forward.reverse ? 0 : n_.B, later, p_.y + (forward.reverse ? n_.B * n_.R : 0), false);
    if (p_.h0 && n_.T > 0) add(forward.first(0), n_.B, p_.h0, true);
  }

  const int threads_;
  const RecurrentBackward<S> p_;
  const RecurrentSizes n_;
  const Walk walk_;  // back
  const Cell cell_;
  const int64_t rows_;
  const Scratch<T> delta_, w_hh_, w_hr_, dstate_;
  const Scratch<S> before_;
  const int64_t chunk_;  // steps after which another pass may go on
  const Scratch<T> w_ih_;
  const Scratch<T> first_;
  const Result<T, S> dx_, dw_ih_, dw_hh_;
  const Scratch<T> biases_;  // [delta_row]
  const Result<T, S> dh0_, dw_hr_;
  const Gemm<T> product_;
};

// Runs a pass on all its threads.
inline void run_alone(Pass& pass) {
  parallel(pass.threads(), [&](const Team& team) { pass.run(team); });
  pass.finish();
}

// Runs passes of one thread each; a pass may read what those before it make.
inline void run_side_by_side(int threads, const std::vector<std::unique_ptr<Pass>>& passes) {
  const int64_t count = passes.size();
  parallel(int(std::min<int64_t>(threads, count)), [&](const Team& team) {
    for (int64_t i = team.rank; i < count; i += team.size) passes[i]->run(Team{0, 1, nullptr});
  });
  for (const auto& pass : passes) pass->finish();
}

}  // namespace pykernels
