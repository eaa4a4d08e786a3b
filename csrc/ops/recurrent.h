// What rnn, gru and lstm share: a pass over a sequence forward, and back through time, around a
// cell.
//
// Forward, the input product W_ih x_t of many steps at once, then the steps. Backward, the steps,
// then the large products dx, dW_ih, dW_hh over all steps at once.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "../core/gemm.h"
#include "../core/recurrence.h"

namespace pykernels {

struct RecurrentSizes {
  int64_t T, B, I, H;
  int64_t R;  // columns of y: H, or the size that an lstm projects to
};

// Row-major and contiguous, stored as S. Rows lie as `walk` has them, N in all; G is the number of
// gates of the op.
template <class S>
struct RecurrentForward {
  RecurrentSizes sizes;
  Walk walk;
  const S* x;     // [N, I]
  const S* w_ih;  // [G H, I]
  const S* w_hh;  // [G H, R]
  const S* b_ih;  // [G H] or nullptr
  const S* b_hh;  // [G H] or nullptr
  const S* h0;    // [B, R] or nullptr for zeros
  const S* w_hr;  // [R, H] or nullptr for none
  S* y;           // [N, R], out
  S* h_n;         // [B, R], out
};

// A gradient that is not wanted is nullptr.
template <class S>
struct RecurrentBackward {
  RecurrentSizes sizes;
  Walk walk;  // of the forward pass
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
  // This thread's share of the rounding to S, once the team has met.
  void narrow_share(const Team& team) const {
    if constexpr (!kSame) {
      if (!to_) return;
      const Range mine = team.share(count_, lanes<T>);
      for (int64_t i = mine.begin; i < mine.end; i += lanes<T>)
        store_n(to_ + i, load_n(scratch_.get() + i, mine.end - i), mine.end - i);
    }
  }

 private:
  static constexpr bool kSame = std::is_same_v<T, S>;
  S* const to_;
  const int64_t count_;
  const Scratch<T> scratch_;
};

// sums[j] = sum over i of values[i * row + j]; this thread's columns. Partial sums of 64 rows keep
// the rounding of a long sum down.
template <class T>
void sum_rows(const Team& team, const T* values, int64_t rows, int64_t columns, int64_t row,
              T* sums) {
  constexpr int64_t block = 64;
  const Range mine = team.share(columns, lanes<T>);
  for (int64_t j = mine.begin; j < mine.end; j += lanes<T>) {
    const int64_t count = mine.end - j;
    vec<T> total{};
    for (int64_t i0 = 0; i0 < rows; i0 += block) {
      vec<T> partial{};
      for (int64_t i = i0; i < std::min(rows, i0 + block); ++i)
        partial += load_n(values + i * row + j, count);
      total += partial;
    }
    store_n(sums + j, total, count);
  }
}

// bias [all] = b_ih + b_hh, where b_hh joins the first `joined` values only.
template <class T, class S>
void add_biases(const RecurrentForward<S>& p, int64_t all, int64_t joined, T* bias) {
  for (int64_t i = 0; i < all; ++i)
    bias[i] = T(p.b_ih ? widen(p.b_ih[i]) : 0) + T(p.b_hh && i < joined ? widen(p.b_hh[i]) : 0);
}

// For products whose finish reads nothing that would have to be fetched.
constexpr auto nothing = [](int64_t, int64_t) {};

// ---- forward ------------------------------------------------------------------------------------

// Where a cell finds itself in a forward pass.
template <class T>
struct ForwardStep {
  int64_t first;    // row of all rows at which the step's rows begin
  int64_t carried;  // rows of the step whose state before it is in `before`; the others' is in h0
  const T* before;  // [carried, R]
  T* gates;         // [rows, Cell::gate_row]: W_ih x_t + b at first; the cell's own afterwards
};

// Cell has
//   static kGates            gates of a unit
//   int64_t gate_row         values between two rows of gates
//   T* gates                 [N, gate_row] where the gates are kept, or nullptr
//   T* unprojected           [N, H] where states before a projection are kept, or nullptr
//   const T* bias            [G H], to add to the input product
//   void fetch(step, row, unit)
//                            asks for what `state` will read of a panel of units
//   vec<T> state(step, row, unit, count, product)
//                            the state of some units, before a projection
template <class S, class Cell>
class ForwardPass {
  using T = compute_t<S>;
  static constexpr bool kSame = std::is_same_v<T, S>;
  static constexpr int kGates = Cell::kGates;
  // Rows whose input product is computed at a time, where the gates are not kept.
  static constexpr int64_t kChunkRows = 512;

 public:
  ForwardPass(int threads, const RecurrentForward<S>& p, const Cell& cell)
      : p_(p), n_(p.sizes), walk_(p.walk), cell_(cell),
        chunk_(cell.gates ? std::max<int64_t>(1, n_.T)
                          : std::max<int64_t>(1, kChunkRows / std::max<int64_t>(1, n_.B))),
        chunk_rows_(std::min(walk_.total(), chunk_ * n_.B)), h0_(p.h0, n_.B * n_.R),
        gates_(cell.gates ? 0 : chunk_rows_ * cell.gate_row),
        w_hh_(gates_size<T>(kGates, n_.H, n_.R)), w_hr_(p.w_hr ? gates_size<T>(1, n_.R, n_.H) : 0),
        unprojected_(p.w_hr && !cell.unprojected ? n_.B * n_.H : 0),
        states_(kSame ? 0 : 2 * n_.B * n_.R), product_(threads, kGates * n_.H, n_.I) {}

  void run(const Team& team) const {
    pack_gates<T>(team, View<S>{p_.w_hh, n_.R, 1}, kGates, n_.H, n_.R, w_hh_.get());
    if (p_.w_hr) pack_gates<T>(team, View<S>{p_.w_hr, n_.H, 1}, 1, n_.R, n_.H, w_hr_.get());
    for (int64_t begin = 0; begin < n_.T; begin += chunk_) {
      const int64_t end = std::min(n_.T, begin + chunk_);
      const Range rows = walk_.span(begin, end);
      T* const gates = cell_.gates ? cell_.gates + rows.begin * cell_.gate_row : gates_.get();
      if (begin > 0) team.wait();  // until no thread reads the gates of the chunk before
      product_.run(team, {rows.size(), kGates * n_.H, n_.I},
                   View<S>{p_.x + rows.begin * n_.I, n_.I, 1}, View<S>{p_.w_ih, 1, n_.I},
                   cell_.bias, false, gates, cell_.gate_row);
      team.wait();
      walk(team, begin, end, gates - rows.begin * cell_.gate_row);
    }
  }

  // Once the team is done: h_n, each sequence's last state.
  void finish() const {
    for (int64_t b = 0; b < n_.B; ++b) {
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
  // Steps [begin, end); row 0 of all rows has its gates at `gates`.
  void walk(const Team& team, int64_t begin, int64_t end, T* gates) const {
    StepShare share(team, walk_, n_.R, kGates * n_.H);
    const int64_t all_blocks = ceil_div(n_.H, kPanel<T>), all_out = ceil_div(n_.R, kPanel<T>);
    for (int64_t s = begin; s < end && !share.idle(); ++s) {
      const Range rows = share.rows(s), blocks = share.blocks(all_blocks);
      const ForwardStep<T> step{walk_.first(s), walk_.carried(s), s > 0 ? states(s - 1) : nullptr,
                                gates + walk_.first(s) * cell_.gate_row};
      T* const unprojected =
          cell_.unprojected ? cell_.unprojected + step.first * n_.H : unprojected_.get();
      const auto finish = [&](int64_t row, int64_t unit, int64_t count, const T* product) {
        const vec<T> state = cell_.state(step, row, unit, count, product);
        if (p_.w_hr) store_n(unprojected + row * n_.H + unit, state, count);
        else keep(s, row, unit, count, state);
      };
      const Range old{rows.begin, std::min(rows.end, step.carried)};
      const Range fresh{std::max(rows.begin, step.carried), rows.end};
      const auto fetch = [&](int64_t row, int64_t unit) { cell_.fetch(step, row, unit); };
      multiply_gates<T, kGates>(old, blocks, n_.H, n_.R, step.before, n_.R, w_hh_.get(), fetch,
                                finish);
      multiply_gates<T, kGates>(fresh, blocks, n_.H, n_.R, h0_.get(), n_.R, w_hh_.get(), fetch,
                                finish);
      share.meet();
      if (!p_.w_hr) continue;
      if (share.idle()) return;
      multiply_gates<T, 1>(rows, share.blocks(all_out), n_.R, n_.H, unprojected, n_.H, w_hr_.get(),
                           nothing,
                           [&](int64_t row, int64_t unit, int64_t count, const T* product) {
                             keep(s, row, unit, count, load(product));
                           });
      share.meet();
    }
  }

  // The states of step s as T, [rows, R]: y itself, or where y is 16 bits wide, the last two steps.
  T* states(int64_t s) const {
    if constexpr (kSame) return p_.y + walk_.first(s) * n_.R;
    else return states_.get() + (s & 1) * n_.B * n_.R;
  }

  PK_INLINE void keep(int64_t s, int64_t row, int64_t unit, int64_t count, vec<T> state) const {
    store_n(states(s) + row * n_.R + unit, state, count);
    if constexpr (!kSame) store_n(p_.y + (walk_.first(s) + row) * n_.R + unit, state, count);
  }

  const RecurrentForward<S>& p_;
  const RecurrentSizes& n_;
  const Walk& walk_;
  const Cell& cell_;
  const int64_t chunk_, chunk_rows_;  // steps, and rows, of one input product
  const Widened<T, S> h0_;
  const Scratch<T> gates_, w_hh_, w_hr_, unprojected_, states_;
  const Gemm<T> product_;
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
//   vec<T> rest(row, unit, count)
//                            what dh0 gets beside W_hh^T delta
//   std::vector<DeltaPiece> pieces() const
// where the first G H columns of delta meet W_hh.
template <class S, class Cell>
class BackwardPass {
  using T = compute_t<S>;
  static constexpr int kGates = Cell::kGates;

 public:
  BackwardPass(int threads, const RecurrentBackward<S>& p, const Cell& cell)
      : p_(p), n_(p.sizes), walk_(p.walk.back()), cell_(cell), rows_(walk_.total()),
        delta_(rows_ * cell.delta_row), w_hh_(gates_size<T>(1, n_.R, kGates * n_.H)),
        w_hr_(p.w_hr ? gates_size<T>(1, n_.H, n_.R) : 0), dstate_(p.w_hr ? rows_ * n_.R : 0),
        // Where sequences end at different steps, what was before a row is no fixed distance away.
        before_(p.walk.offsets && p.dw_hh ? rows_ * n_.R : 0),
        first_(p.walk.offsets && p.walk.reverse && p.dh0 ? n_.B * kGates * n_.H : 0),
        dx_(p.dx, rows_ * n_.I), dw_ih_(p.dw_ih, kGates * n_.H * n_.I),
        dw_hh_(p.dw_hh, kGates * n_.H * n_.R), db_ih_(p.db_ih, kGates * n_.H),
        db_hh_(p.db_hh, kGates * n_.H), dh0_(p.dh0, n_.B * n_.R), dw_hr_(p.dw_hr, n_.R * n_.H),
        product_(threads, std::max({n_.I, n_.R, n_.H}), std::max(rows_, kGates * n_.H)) {}

  void run(const Team& team) const {
    pack_gates<T>(team, View<S>{p_.w_hh, 1, n_.R}, 1, n_.R, kGates * n_.H, w_hh_.get());
    if (p_.w_hr) pack_gates<T>(team, View<S>{p_.w_hr, 1, n_.H}, 1, n_.H, n_.R, w_hr_.get());
    team.wait();
    walk(team);
    team.wait();
    products(team);
    team.wait();
    dx_.narrow_share(team);
    dw_ih_.narrow_share(team);
    dw_hh_.narrow_share(team);
    db_ih_.narrow_share(team);
    db_hh_.narrow_share(team);
    dh0_.narrow_share(team);
    dw_hr_.narrow_share(team);
  }

 private:
  void walk(const Team& team) const {
    const Walk forward = walk_.back();
    const int64_t row_size = cell_.delta_row;
    StepShare share(team, walk_, kGates * n_.H, n_.R);
    const int64_t all_blocks = ceil_div(n_.H, kPanel<T>), all_out = ceil_div(n_.R, kPanel<T>);
    for (int64_t s = 0; s < n_.T && !share.idle(); ++s) {
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
      const auto finish = [&](int64_t row, int64_t unit, int64_t count, const T* product) {
        vec<T> dh = load(product);
        const int64_t at = row * n_.R + unit;
        if (p_.dy) dh += load_n(p_.dy + step.first * n_.R + at, count);
        if (p_.dh_n && row >= step.carried) dh += load_n(p_.dh_n + at, count);
        if (p_.w_hr) store_n(dstate + at, dh, count);
        else cell_.delta(step, row, unit, count, dh, delta + row * row_size + unit);
      };
      const auto fetch = [&](int64_t row, int64_t unit) {
        if (p_.dy) prefetch(p_.dy + (step.first + row) * n_.R + unit);
        if (!p_.w_hr) cell_.fetch(step, row, unit);
      };
      multiply_gates<T, 1>(old, out_blocks, n_.R, kGates * n_.H, after, row_size, w_hh_.get(),
                           fetch, finish);
      multiply_gates<T, 1>(fresh, out_blocks, n_.R, kGates * n_.H, nullptr, row_size, w_hh_.get(),
                           fetch, finish);
      share.meet();
      if (!p_.w_hr) continue;
      if (share.idle()) return;
      multiply_gates<T, 1>(
          rows, share.blocks(all_blocks), n_.H, n_.R, dstate, n_.R, w_hr_.get(),
          [&](int64_t row, int64_t unit) { cell_.fetch(step, row, unit); },
          [&](int64_t row, int64_t unit, int64_t count, const T* product) {
            cell_.delta(step, row, unit, count, load(product), delta + row * row_size + unit);
          });
      share.meet();
    }
    if (!p_.dh0 || share.idle()) return;
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
                         n_.T > 0 ? first : nullptr, first_row, w_hh_.get(), nothing,
                         [&](int64_t row, int64_t unit, int64_t count, const T* product) {
                           vec<T> dh = load(product) + cell_.rest(row, unit, count);
                           if (n_.T == 0 && p_.dh_n)
                             dh += load_n(p_.dh_n + row * n_.R + unit, count);
                           store_n(dh0_.get() + row * n_.R + unit, dh, count);
                         });
  }

  // dx, the weights' gradients and the biases'.
  void products(const Team& team) const {
    const int64_t row = cell_.delta_row, gates = kGates * n_.H;
    bool first = true;
    for (const DeltaPiece& piece : cell_.pieces()) {
      const View<T> part{delta_.get() + piece.column, row, 1};
      if (p_.dx)
        product_.run(team, {rows_, n_.I, piece.count}, part,
                     View<S>{p_.w_ih + piece.gate_row * n_.I, n_.I, 1}, nullptr, !first, dx_.get(),
                     n_.I);
      if (p_.dw_ih)
        product_.run(team, {piece.count, n_.I, rows_}, part.transposed(), View<S>{p_.x, n_.I, 1},
                     nullptr, false, dw_ih_.get() + piece.gate_row * n_.I, n_.I);
      if (p_.db_ih)
        sum_rows(team, part.data, rows_, piece.count, row, db_ih_.get() + piece.gate_row);
      first = false;
    }
    if (p_.db_hh) sum_rows(team, delta_.get(), rows_, gates, row, db_hh_.get());
    if (p_.dw_hr)
      product_.run(team, {n_.R, n_.H, rows_}, View<T>{dstate_.get(), 1, n_.R},
                   View<T>{cell_.unprojected, n_.H, 1}, nullptr, false, dw_hr_.get(), n_.H);
    if (p_.dw_hh) recurrent_gradient(team);
  }

  // dW_hh = sum of delta_t h_{t-1}^T.
  void recurrent_gradient(const Team& team) const {
    const int64_t row = cell_.delta_row, gates = kGates * n_.H;
    const auto add = [&](int64_t begin, int64_t count, const S* before, bool accumulate) {
      product_.run(team, {gates, n_.R, count}, View<T>{delta_.get() + begin * row, 1, row},
                   View<S>{before, n_.R, 1}, nullptr, accumulate, dw_hh_.get(), n_.R);
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

  const RecurrentBackward<S>& p_;
  const RecurrentSizes& n_;
  const Walk walk_;  // back
  const Cell& cell_;
  const int64_t rows_;
  const Scratch<T> delta_, w_hh_, w_hr_, dstate_;
  const Scratch<S> before_;
  const Scratch<T> first_;
  const Result<T, S> dx_, dw_ih_, dw_hh_, db_ih_, db_hh_, dh0_, dw_hr_;
  const Gemm<T> product_;
};

// Multiply-adds from which a pass is worth waking a team.
constexpr int64_t kShareablePass = 200000;

// How many threads run a pass of `products` products of all rows with weights of this size.
inline int team_for(int threads, const RecurrentSizes& n, int64_t rows, int64_t gates,
                    int64_t products) {
  return rows * gates * n.H * (n.I + n.R) * products < kShareablePass ? 1 : threads;
}

template <class S, class Cell>
void run_forward(int threads, const RecurrentForward<S>& p, const Cell& cell) {
  threads = team_for(threads, p.sizes, p.walk.total(), Cell::kGates, 1);
  const ForwardPass<S, Cell> pass(threads, p, cell);
  parallel(threads, [&](const Team& team) { pass.run(team); });
  pass.finish();
}

template <class S, class Cell>
void run_backward(int threads, const RecurrentBackward<S>& p, const Cell& cell) {
  threads = team_for(threads, p.sizes, p.walk.total(), Cell::kGates, 2);
  const BackwardPass<S, Cell> pass(threads, p, cell);
  parallel(threads, [&](const Team& team) { pass.run(team); });
}

}  // namespace pykernels
