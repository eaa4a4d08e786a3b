// r, z = sigmoid(W_i x_t + b_i + W_h h_{t-1} + b_h)      n = tanh(W_in x_t + b_in + r hn)
// hn   = W_hn h_{t-1} + b_hn                              h_t = (1 - z) n + z h_{t-1}
//
// over a whole sequence. K. Cho et al., "Learning phrase representations using RNN encoder-decoder"
// (2014), with the reset gate after the product, as torch.nn.GRU has it.
#include "../core/units.h"
#include "step.h"

namespace pykernels {
namespace {

template <class T>
struct GruForwardCell {
  static constexpr int kGates = 3, kBiases = 4;
  static constexpr T* unprojected = nullptr;
  int64_t H;
  T* kept;  // r, z, n and hn of all rows in blocks, or nullptr

  PK_INLINE void fetch(const ForwardStep<T>& step, int64_t row, int64_t unit) const {
    const T* const input = step.input + row * step.input_row + gate_at<T>(3, unit);
    for (int g = 0; g < 3; ++g) prefetch(input + g * kPanel<T>);
  }

  // Leaves z and what n is the tanh of in the places of the first two products.
  PK_INLINE void gates(const ForwardStep<T>& step, int64_t row, int64_t unit, int64_t,
                       T* product) const {
    constexpr int64_t next = kPanel<T>;
    const T* const input = step.input + row * step.input_row + gate_at<T>(3, unit);
    const T* const bias = step.bias + gate_at<T>(4, unit);
    const auto sum = [&](int g) {
      return load_units(input + g * next) + load_units(product + g * next) +
             load_units(bias + g * next);
    };
    const Units<T> r = sigmoid(sum(0)), z = sigmoid(sum(1));
    const Units<T> hn = load_units(product + 2 * next) + load_units(bias + 3 * next);
    store_units(product, z);
    store_units(product + next,
                load_units(input + 2 * next) + load_units(bias + 2 * next) + r * hn);
    if (kept) {
      T* const to = kept + gate_at<T>(4, H, step.first + row, unit);
      store_units(to, r);
      store_units(to + next, z);
      store_units(to + 3 * next, hn);
    }
  }

  PK_INLINE Units<T> state(const ForwardStep<T>& step, int64_t row, int64_t unit, int64_t count,
                           const T* product) const {
    constexpr int64_t next = kPanel<T>;
    const T* const before = row < step.carried ? step.before : step.h0;
    const Units<T> h = before ? load_units(before + row * H + unit, count) : Units<T>{};
    const Units<T> z = load_units(product), n = tanh(load_units(product + next));
    if (kept) store_units(kept + gate_at<T>(4, H, step.first + row, unit) + 2 * next, n);
    return one_minus(z) * n + z * h;
  }
};

// delta is [N, 4 H]: the gradients of r and z before their sigmoid, of hn, and of n before its
// tanh.
template <class T, class S>
struct GruBackwardCell {
  static constexpr int kGates = 3;
  static constexpr T* unprojected = nullptr;
  int64_t H, delta_row;
  const T* gates;  // of the forward pass
  const S* y;
  const S* h0;  // or nullptr
  T* carry;     // [B, H]: z dh of the step after; zeros at first

  PK_INLINE const T* gates_of(const BackwardStep& step, int64_t row, int64_t unit) const {
    return gates + gate_at<T>(4, H, step.first + row, unit);
  }

  PK_INLINE void fetch(const BackwardStep& step, int64_t row, int64_t unit) const {
    for (int g = 0; g < 4; ++g) prefetch(gates_of(step, row, unit) + g * kPanel<T>);
    prefetch(y + (step.before + row) * H + unit);
    prefetch(carry + row * H + unit);
  }

  PK_INLINE void delta(const BackwardStep& step, int64_t row, int64_t unit, int64_t count,
                       Units<T> dh, T* to) const {
    const T* const gate = gates_of(step, row, unit);
    const Units<T> r = load_units(gate), z = load_units(gate + kPanel<T>);
    const Units<T> n = load_units(gate + 2 * kPanel<T>), hn = load_units(gate + 3 * kPanel<T>);
    const S* const before = row < step.n_before ? y + (step.before + row) * H
                            : h0                ? h0 + row * H
                                                : nullptr;
    const Units<T> h = before ? load_units(before + unit, count) : Units<T>{};
    dh += load_units(carry + row * H + unit, count);
    store_units(carry + row * H + unit, z * dh, count);
    const Units<T> dn = dh * one_minus(z) * one_minus(n * n);
    store_units(to, dn * hn * r * one_minus(r), count);
    store_units(to + H, dh * (h - n) * z * one_minus(z), count);
    store_units(to + 2 * H, dn * r, count);
    store_units(to + 3 * H, dn, count);
  }
  Units<T> rest(int64_t row, int64_t unit, int64_t count) const {
    return load_units(carry + row * H + unit, count);
  }
  std::array<DeltaPiece, 2> pieces() const { return {{{0, 2 * H, 0}, {3 * H, H, 2 * H}}}; }
};

// The shape, batch sizes, reverse; what recurrent_forward and recurrent_backward take; the gates.
using ForwardCall = std::tuple<RecurrentShape, std::vector<int64_t>, bool, std::array<Address, 8>,
                               std::array<Address, 2>, Address>;
using BackwardCall = std::tuple<RecurrentShape, std::vector<int64_t>, bool, std::array<Address, 8>,
                                std::array<Address, 7>, Address>;

template <class S>
class GruBackward : public Pass {
  using T = compute_t<S>;
  using Cell = GruBackwardCell<T, S>;

 public:
  GruBackward(int threads, const RecurrentBackward<S>& p, const T* gates)
      : carry_(p.sizes.B * p.sizes.H),
        pass_(threads, p, Cell{p.sizes.H, 4 * p.sizes.H, gates, p.y, p.h0, carry_.get()}) {
    std::fill_n(carry_.get(), p.sizes.B * p.sizes.H, T(0));
  }
  int threads() const override { return pass_.threads(); }
  void run(const Team& team) override { pass_.run(team); }

 private:
  const Scratch<T> carry_;
  BackwardPass<S, Cell> pass_;
};

void forward(int dtype, int threads, bool chained, const std::vector<ForwardCall>& calls) {
  run_passes(dtype, threads, chained, calls,
             [&](auto tag, const auto& call, const Batch& batch, int threads, const Link& link) {
               using S = typename decltype(tag)::type;
               using Cell = GruForwardCell<compute_t<S>>;
               const auto& [shape, batch_sizes, reverse, in, out, gates] = call;
               const auto p = recurrent_forward<S>(shape, batch, link, in, out);
               const Cell cell{p.sizes.H, pointer<compute_t<S>>(gates)};
               return std::make_unique<ForwardPass<S, Cell>>(threads, p, cell);
             });
}

void backward(int dtype, int threads, bool chained, const std::vector<BackwardCall>& calls) {
  run_passes(dtype, threads, chained, calls,
             [&](auto tag, const auto& call, const Batch& batch, int threads, const Link& link) {
               using S = typename decltype(tag)::type;
               const auto& [shape, batch_sizes, reverse, in, out, gates] = call;
               const auto p = recurrent_backward<S>(shape, batch, link, in, out);
               return std::make_unique<GruBackward<S>>(threads, p,
                                                       pointer<const compute_t<S>>(gates));
             });
}

void step(const StepCall& call) {
  forward(call.dtype, call.threads, false, {{call.sizes, {}, false, call.in, call.out, 0}});
}

}  // namespace

void bind_gru(py::module_& m) {
  bind_pack<GruForwardCell>(m, "gru");
  bind_step(m, "gru", &step, 1);
  m.def("gru_forward", &forward);
  m.def("gru_backward", &backward);
}

}  // namespace pykernels
