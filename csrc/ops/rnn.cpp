#include "rnn.h"

#include <pybind11/stl.h>

#include <array>

#include "../bind.h"
#include "../core/gemm.h"
#include "../core/recurrence.h"
#include "../core/vec_math.h"

namespace pykernels {
namespace {

// Step s of a walk through T time steps, in either direction.
struct Walk {
  int64_t T;
  bool reverse;
  int64_t time(int64_t step) const { return reverse ? T - 1 - step : step; }
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

// sums[j] = sum over i of values[i, j]; this thread's columns. Partial sums of 64 rows keep the
// rounding of a long sum down.
template <class T>
void sum_rows(const Team& team, const T* values, int64_t rows, int64_t columns, T* sums) {
  constexpr int64_t block = 64;
  const Range mine = team.share(columns, lanes<T>);
  for (int64_t j = mine.begin; j < mine.end; j += lanes<T>) {
    const int64_t count = mine.end - j;
    vec<T> total{};
    for (int64_t i0 = 0; i0 < rows; i0 += block) {
      vec<T> partial{};
      for (int64_t i = i0; i < std::min(rows, i0 + block); ++i)
        partial += load_n(values + i * columns + j, count);
      total += partial;
    }
    store_n(sums + j, total, count);
  }
}

template <class T, class S>
struct ForwardCell {
  RnnSizes n;
  Walk walk;
  const T* h0;  // [B, H] or nullptr
  T* state;     // [T, B, H]: W_ih x_t + b before step t, h_t after
  S* y;         // [T, B, H]: `state` itself, or where its rounded copy goes

  const T* left(int64_t step) const {
    return step == 0 ? h0 : state + walk.time(step - 1) * n.B * n.H;
  }

  PK_INLINE void finish(int64_t step, int64_t row, int64_t column, int64_t count,
                        vec<T> product) const {
    const int64_t at = (walk.time(step) * n.B + row) * n.H + column;
    const vec<T> a = load_n(state + at, count) + product;
    const vec<T> h = n.relu ? select<vec<T>>(a < 0, vec<T>{}, a) : tanh<T>(a);
    store_n(state + at, h, count);
    if constexpr (!std::is_same_v<T, S>) store_n(y + at, h, count);
  }
};

template <class T, class S>
struct BackwardCell {
  RnnSizes n;
  Walk walk;  // from the last step to the first
  const S* y;
  const S* dy;    // or nullptr
  const S* dh_n;  // or nullptr
  T* delta;       // [T, B, H], out: dL/da_t
  T* dh0;         // [B, H], out, at step T

  const T* left(int64_t step) const {
    return step == 0 ? nullptr : delta + walk.time(step - 1) * n.B * n.H;
  }

  PK_INLINE void finish(int64_t step, int64_t row, int64_t column, int64_t count, vec<T> dh) const {
    const int64_t cell = row * n.H + column;
    if (step == 0 && dh_n) dh += load_n(dh_n + cell, count);
    if (step == n.T) return store_n(dh0 + cell, dh, count);
    const int64_t at = walk.time(step) * n.B * n.H + cell;
    if (dy) dh += load_n(dy + at, count);
    const vec<T> h = load_n(y + at, count);
    store_n(delta + at, n.relu ? select<vec<T>>(h > 0, dh, vec<T>{}) : dh * (1 - h * h), count);
  }
};

}  // namespace

template <class S>
void rnn_forward(int threads, const RnnForward<S>& p) {
  using T = compute_t<S>;
  const RnnSizes& n = p.sizes;
  const int64_t cells = n.B * n.H;
  const Walk walk{n.T, n.reverse};
  const Widened<T, S> h0(p.h0, cells);
  const Result<T, S> state(p.y, n.T * cells);
  const Scratch<T> bias(n.H), packed(packed_size<T>(n.H, n.H));
  for (int64_t i = 0; i < n.H; ++i)
    bias.get()[i] = T(p.b_ih ? widen(p.b_ih[i]) : 0) + T(p.b_hh ? widen(p.b_hh[i]) : 0);
  const Gemm<T, S, S> input_product(threads, n.T * n.B, n.H, n.I);
  const ForwardCell<T, S> cell{n, walk, h0.get(), state.get(), p.y};
  parallel(threads, [&](const Team& team) {
    input_product.run(team, {p.x, n.I, 1}, {p.w_ih, 1, n.I}, bias.get(), false, state.get(), n.H);
    pack_panels(team, View<S>{p.w_hh, 1, n.H}, n.H, n.H, packed.get());
    team.wait();
    run_recurrence<T>(team, n.T, n.B, n.H, n.H, packed.get(), cell);
  });
  for (int64_t i = 0; i < cells; ++i) {
    if (n.T > 0) p.h_n[i] = p.y[walk.time(n.T - 1) * cells + i];
    else if (p.h0) p.h_n[i] = p.h0[i];
    else narrow(compute_t<S>(0), &p.h_n[i]);
  }
}

template <class S>
void rnn_backward(int threads, const RnnBackward<S>& p) {
  using T = compute_t<S>;
  const RnnSizes& n = p.sizes;
  const int64_t cells = n.B * n.H, rows = n.T * n.B;
  const Scratch<T> delta(n.T * cells), packed(packed_size<T>(n.H, n.H));
  const Result<T, S> dx(p.dx, rows * n.I), dw_ih(p.dw_ih, n.H * n.I), dw_hh(p.dw_hh, n.H * n.H),
      db(p.db, n.H), dh0(p.dh0, cells);
  const BackwardCell<T, S> cell{n, {n.T, !n.reverse}, p.y, p.dy, p.dh_n, delta.get(), dh0.get()};

  // h_{t-1} beside delta_t: all of y but its last step beside all of delta but its first.
  const int64_t later = n.T > 0 ? rows - n.B : 0;
  const T* const delta_later = delta.get() + (n.reverse ? 0 : cells);
  const S* const y_before = p.y + (n.reverse ? cells : 0);
  const T* const delta_first = delta.get() + (n.reverse ? (n.T - 1) * cells : 0);

  const Gemm<T, T, S> dx_product(threads, p.dx ? rows : 0, n.I, n.H);
  const Gemm<T, T, S> dw_ih_product(threads, p.dw_ih ? n.H : 0, n.I, rows);
  const Gemm<T, T, S> dw_hh_product(threads, p.dw_hh ? n.H : 0, n.H, later);
  const Gemm<T, T, S> dw_hh_first(threads, p.dw_hh && p.h0 && n.T > 0 ? n.H : 0, n.H, n.B);

  parallel(threads, [&](const Team& team) {
    pack_panels(team, View<S>{p.w_hh, n.H, 1}, n.H, n.H, packed.get());
    team.wait();
    run_recurrence<T>(team, n.T + (p.dh0 ? 1 : 0), n.B, n.H, n.H, packed.get(), cell);
    team.wait();
    dx_product.run(team, {delta.get(), n.H, 1}, {p.w_ih, n.I, 1}, nullptr, false, dx.get(), n.I);
    dw_ih_product.run(team, {delta.get(), 1, n.H}, {p.x, n.I, 1}, nullptr, false, dw_ih.get(), n.I);
    dw_hh_product.run(team, {delta_later, 1, n.H}, {y_before, n.H, 1}, nullptr, false, dw_hh.get(),
                      n.H);
    dw_hh_first.run(team, {delta_first, 1, n.H}, {p.h0, n.H, 1}, nullptr, true, dw_hh.get(), n.H);
    if (p.db) sum_rows(team, delta.get(), rows, n.H, db.get());
    team.wait();
    dx.narrow_share(team);
    dw_ih.narrow_share(team);
    dw_hh.narrow_share(team);
    db.narrow_share(team);
    dh0.narrow_share(team);
  });
}

namespace {

using Sizes = std::array<int64_t, 4>;  // T, B, I, H

RnnSizes sizes(const Sizes& n, bool relu, bool reverse) {
  return {n[0], n[1], n[2], n[3], relu, reverse};
}

}  // namespace

void bind_rnn(py::module_& m) {
  m.def("rnn_forward", [](int dtype, int threads, const Sizes& n, bool relu, bool reverse,
                          const std::array<Address, 6>& in, Address y, Address h_n) {
    dispatch(dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      const auto at = [&](int i) { return pointer<const S>(in[i]); };
      rnn_forward<S>(threads, {sizes(n, relu, reverse), at(0), at(1), at(2), at(3), at(4), at(5),
                               pointer<S>(y), pointer<S>(h_n)});
    });
  });
  m.def("rnn_backward", [](int dtype, int threads, const Sizes& n, bool relu, bool reverse,
                           const std::array<Address, 7>& in, const std::array<Address, 5>& out) {
    dispatch(dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      const auto at = [&](int i) { return pointer<const S>(in[i]); };
      const auto to = [&](int i) { return pointer<S>(out[i]); };
      rnn_backward<S>(threads, {sizes(n, relu, reverse), at(0), at(1), at(2), at(3), at(4), at(5),
                                at(6), to(0), to(1), to(2), to(3), to(4)});
    });
  });
}

}  // namespace pykernels
