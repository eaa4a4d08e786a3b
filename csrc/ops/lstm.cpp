// i, f, o = sigmoid(W_i x_t + b_i + W_h h_{t-1} + b_h)      g = tanh(...)
// c_t = f c_{t-1} + i g                                    h_t = o tanh(c_t), or W_hr of that
//
// over a whole sequence. S. Hochreiter and J. Schmidhuber, "Long short-term memory" (1997), with
// the forget gate of F. Gers et al. (2000) and the projection of H. Sak et al. (2014).
#include "../core/units.h"
#include "step.h"

namespace pykernels {
namespace {

// What an lstm keeps of a forward pass for the backward pass, each nullptr where it is not wanted.
template <class T>
struct LstmKept {
  T* gates;        // i, f, g, o of all rows in blocks
  T* cells;        // [N, H]: c_t
  T* unprojected;  // [N, H]: o tanh(c_t), where there is a projection
};

template <class T>
struct LstmForwardCell {
  static constexpr int kGates = 4, kBiases = 4;
  int64_t H;
  T* kept;  // the gates, or nullptr
  T* unprojected;
  T* cells;  // or nullptr
  T* c;      // [B, H]: the cell of each sequence, c0 at first and c_n in the end

  PK_INLINE void fetch(const ForwardStep<T>& step, int64_t row, int64_t unit) const {
    const T* const input = step.input + row * step.input_row + gate_at<T>(4, unit);
    for (int g = 0; g < 4; ++g) prefetch(input + g * kPanel<T>);
    prefetch(c + row * H + unit);
  }

  // Leaves c_t where the product for i was, and o where that for f was.
  PK_INLINE void gates(const ForwardStep<T>& step, int64_t row, int64_t unit, int64_t count,
                       T* product) const {
    constexpr int64_t next = kPanel<T>;
    const int64_t at = gate_at<T>(4, unit);
    const T* const input = step.input + row * step.input_row + at;
    const T* const bias = step.bias + at;
    const auto sum = [&](int g) {
      return load_units(input + g * next) + load_units(product + g * next) +
             load_units(bias + g * next);
    };
    const Units<T> i = sigmoid(sum(0)), f = sigmoid(sum(1)), g = tanh(sum(2)), o = sigmoid(sum(3));
    T* const cell = c + row * H + unit;
    const Units<T> now = f * load_units(cell, count) + i * g;
    store_units(cell, now, count);
    store_units(product, now);
    store_units(product + next, o);
    if (kept) {
      T* const to = kept + gate_at<T>(4, H, step.first + row, unit);
      store_units(to, i);
      store_units(to + next, f);
      store_units(to + 2 * next, g);
      store_units(to + 3 * next, o);
    }
    if (cells) store_units(cells + (step.first + row) * H + unit, now, count);
  }

  PK_INLINE Units<T> state(const ForwardStep<T>&, int64_t, int64_t, int64_t,
                           const T* product) const {
    return load_units(product + kPanel<T>) * tanh(load_units(product));
  }
};

template <class T, class S>
struct LstmBackwardCell {
  static constexpr int kGates = 4;
  int64_t H, delta_row;
  const T *gates, *cells, *unprojected;  // of the forward pass
  const T* c0;                           // [B, H] or nullptr
  const S* dcells;                       // [N, H] or nullptr for zeros
  T* dc;  // [B, H]: of the cell after a step; dc_n at first and dc0 in the end

  PK_INLINE const T* gates_of(const BackwardStep& step, int64_t row, int64_t unit) const {
    return gates + gate_at<T>(4, H, step.first + row, unit);
  }

  PK_INLINE void fetch(const BackwardStep& step, int64_t row, int64_t unit) const {
    const int64_t at = step.first + row;
    for (int g = 0; g < 4; ++g) prefetch(gates_of(step, row, unit) + g * kPanel<T>);
    prefetch(cells + at * H + unit);
    prefetch(cells + (step.before + row) * H + unit);
    prefetch(dc + row * H + unit);
  }

  PK_INLINE void delta(const BackwardStep& step, int64_t row, int64_t unit, int64_t count,
                       Units<T> dh, T* to) const {
    const int64_t at = (step.first + row) * H + unit;
    const T* const gate = gates_of(step, row, unit);
    const Units<T> i = load_units(gate), f = load_units(gate + kPanel<T>);
    const Units<T> g = load_units(gate + 2 * kPanel<T>), o = load_units(gate + 3 * kPanel<T>);
    const T* const before = row < step.n_before ? cells + (step.before + row) * H
                            : c0                ? c0 + row * H
                                                : nullptr;
    const Units<T> c = before ? load_units(before + unit, count) : Units<T>{};
    const Units<T> th = tanh(load_units(cells + at, count));
    T* const cell = dc + row * H + unit;
    Units<T> now = load_units(cell, count) + dh * o * one_minus(th * th);
    if (dcells) now += load_units(dcells + at, count);
    store_units(cell, now * f, count);
    store_units(to, now * g * i * one_minus(i), count);
    store_units(to + H, now * c * f * one_minus(f), count);
    store_units(to + 2 * H, now * i * one_minus(g * g), count);
    store_units(to + 3 * H, dh * th * o * one_minus(o), count);
  }
  Units<T> rest(int64_t, int64_t, int64_t) const { return {}; }
  std::array<DeltaPiece, 1> pieces() const { return {{{0, 4 * H, 0}}}; }
};

// to = from, or zeros where that is nullptr.
template <class T, class S>
void fill_from(const S* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from ? widen(from[i]) : T(0);
}

template <class S>
class LstmForward : public Pass {
  using T = compute_t<S>;
  using Cell = LstmForwardCell<T>;

 public:
  LstmForward(int threads, const RecurrentForward<S>& p, const S* c0, S* c_n,
              const LstmKept<T>& kept)
      : c_(c_n, p.sizes.B * p.sizes.H),
        pass_(threads, p, Cell{p.sizes.H, kept.gates, kept.unprojected, kept.cells, c_.get()}) {
    fill_from(c0, p.sizes.B * p.sizes.H, c_.get());
  }
  int threads() const override { return pass_.threads(); }
  void run(const Team& team) override { pass_.run(team); }
  void finish() override {
    pass_.finish();
    c_.narrow_share(Team{0, 1, nullptr});
  }

 private:
  const Result<T, S> c_;
  ForwardPass<S, Cell> pass_;
};

// [B, H] each, and dcells [N, H]; nullptr for zeros, or for what is not wanted.
template <class S>
struct LstmCells {
  const S *c0, *dcells, *dc_n;
  S* dc0;
};

template <class S>
class LstmBackward : public Pass {
  using T = compute_t<S>;
  using Cell = LstmBackwardCell<T, S>;

 public:
  LstmBackward(int threads, const RecurrentBackward<S>& p, const LstmCells<S>& cell,
               const LstmKept<const T>& kept)
      : c0_(cell.c0, p.sizes.B * p.sizes.H), dc0_(cell.dc0, p.sizes.B * p.sizes.H),
        dc_(cell.dc0 ? 0 : p.sizes.B * p.sizes.H),
        pass_(threads, p,
              Cell{p.sizes.H, 4 * p.sizes.H, kept.gates, kept.cells, kept.unprojected, c0_.get(),
                   cell.dcells, cell.dc0 ? dc0_.get() : dc_.get()}) {
    fill_from(cell.dc_n, p.sizes.B * p.sizes.H, cell.dc0 ? dc0_.get() : dc_.get());
  }
  int threads() const override { return pass_.threads(); }
  void run(const Team& team) override { pass_.run(team); }
  void finish() override { dc0_.narrow_share(Team{0, 1, nullptr}); }

 private:
  const Widened<T, S> c0_;
  const Result<T, S> dc0_;
  const Scratch<T> dc_;  // where dc0 is not wanted
  BackwardPass<S, Cell> pass_;
};

// The shape, batch sizes, reverse; what recurrent_forward takes; c0, c_n; LstmKept.
using ForwardCall =
    std::tuple<RecurrentShape, std::vector<int64_t>, bool, std::array<Address, 8>,
               std::array<Address, 2>, std::array<Address, 2>, std::array<Address, 3>>;
// The shape, batch sizes, reverse; what recurrent_backward takes; LstmCells; LstmKept.
using BackwardCall =
    std::tuple<RecurrentShape, std::vector<int64_t>, bool, std::array<Address, 8>,
               std::array<Address, 7>, std::array<Address, 4>, std::array<Address, 3>>;

void forward(int dtype, int threads, bool chained, const std::vector<ForwardCall>& calls) {
  run_passes(dtype, threads, chained, calls,
             [&](auto tag, const auto& call, const Batch& batch, int threads, const Link& link) {
               using S = typename decltype(tag)::type;
               using T = compute_t<S>;
               const auto& [shape, batch_sizes, reverse, in, out, cells, kept] = call;
               return std::make_unique<LstmForward<S>>(
                   threads, recurrent_forward<S>(shape, batch, link, in, out),
                   pointer<const S>(cells[0]), pointer<S>(cells[1]),
                   LstmKept<T>{pointer<T>(kept[0]), pointer<T>(kept[1]), pointer<T>(kept[2])});
             });
}

void backward(int dtype, int threads, bool chained, const std::vector<BackwardCall>& calls) {
  run_passes(dtype, threads, chained, calls,
             [&](auto tag, const auto& call, const Batch& batch, int threads, const Link& link) {
               using S = typename decltype(tag)::type;
               using T = const compute_t<S>;
               const auto& [shape, batch_sizes, reverse, in, out, cells, kept] = call;
               return std::make_unique<LstmBackward<S>>(
                   threads, recurrent_backward<S>(shape, batch, link, in, out),
                   LstmCells<S>{pointer<const S>(cells[0]), pointer<const S>(cells[1]),
                                pointer<const S>(cells[2]), pointer<S>(cells[3])},
                   LstmKept<T>{pointer<T>(kept[0]), pointer<T>(kept[1]), pointer<T>(kept[2])});
             });
}

void step(const StepCall& call) {
  forward(call.dtype, call.threads, false,
          {{call.sizes, {}, false, call.in, call.out, {call.c, call.c_next}, {}}});
}

}  // namespace

void bind_lstm(py::module_& m) {
  bind_pack<LstmForwardCell>(m, "lstm");
  bind_step(m, "lstm", &step, 2);
  m.def("lstm_forward", &forward);
  m.def("lstm_backward", &backward);
}

}  // namespace pykernels
