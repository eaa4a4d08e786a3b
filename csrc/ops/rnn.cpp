// h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), f = tanh or relu, over a whole sequence.
#include "../core/units.h"
#include "step.h"

namespace pykernels {
namespace {

template <class T>
struct RnnForwardCell {
  static constexpr int kGates = 1, kBiases = 1;
  static constexpr T* unprojected = nullptr;
  bool relu;

  PK_INLINE void fetch(const ForwardStep<T>& step, int64_t row, int64_t unit) const {
    prefetch(step.input + row * step.input_row + unit);
  }

  PK_INLINE void gates(const ForwardStep<T>&, int64_t, int64_t, int64_t, T*) const {}

  PK_INLINE Units<T> state(const ForwardStep<T>& step, int64_t row, int64_t unit, int64_t,
                           const T* product) const {
    const Units<T> a = load_units(step.input + row * step.input_row + unit) + load_units(product) +
                       load_units(step.bias + unit);
    if (!relu) return tanh(a);
    return for_units([](vec<T> a) { return select<vec<T>>(a < 0, vec<T>{}, a); }, a);
  }
};

template <class T, class S>
struct RnnBackwardCell {
  static constexpr int kGates = 1;
  static constexpr T* unprojected = nullptr;
  bool relu;
  int64_t delta_row;
  const S* y;

  PK_INLINE void fetch(const BackwardStep& step, int64_t row, int64_t unit) const {
    prefetch(y + (step.first + row) * delta_row + unit);
  }

  PK_INLINE void delta(const BackwardStep& step, int64_t row, int64_t unit, int64_t count,
                       Units<T> dh, T* to) const {
    const Units<T> h = load_units(y + (step.first + row) * delta_row + unit, count);
    const auto relu_delta = [](vec<T> h, vec<T> dh) { return select<vec<T>>(h > 0, dh, vec<T>{}); };
    store_units(to, relu ? for_units(relu_delta, h, dh) : dh * one_minus(h * h), count);
  }
  Units<T> rest(int64_t, int64_t, int64_t) const { return {}; }
  std::array<DeltaPiece, 1> pieces() const { return {{{0, delta_row, 0}}}; }
};

// The shape, batch sizes, reverse; what recurrent_forward and recurrent_backward take.
using ForwardCall = std::tuple<RecurrentShape, std::vector<int64_t>, bool, std::array<Address, 8>,
                               std::array<Address, 2>>;
using BackwardCall = std::tuple<RecurrentShape, std::vector<int64_t>, bool, std::array<Address, 8>,
                                std::array<Address, 7>>;

void forward(int dtype, int threads, bool relu, bool chained,
             const std::vector<ForwardCall>& calls) {
  run_passes(dtype, threads, chained, calls,
             [&](auto tag, const auto& call, const Batch& batch, int threads, const Link& link) {
               using S = typename decltype(tag)::type;
               const auto& [shape, batch_sizes, reverse, in, out] = call;
               using Cell = RnnForwardCell<compute_t<S>>;
               const auto p = recurrent_forward<S>(shape, batch, link, in, out);
               return std::make_unique<ForwardPass<S, Cell>>(threads, p, Cell{relu});
             });
}

void backward(int dtype, int threads, bool relu, bool chained,
              const std::vector<BackwardCall>& calls) {
  run_passes(dtype, threads, chained, calls,
             [&](auto tag, const auto& call, const Batch& batch, int threads, const Link& link) {
               using S = typename decltype(tag)::type;
               const auto& [shape, batch_sizes, reverse, in, out] = call;
               using Cell = RnnBackwardCell<compute_t<S>, S>;
               const auto p = recurrent_backward<S>(shape, batch, link, in, out);
               return std::make_unique<BackwardPass<S, Cell>>(threads, p,
                                                              Cell{relu, p.sizes.H, p.y});
             });
}

void step(const StepCall& call) {
  forward(call.dtype, call.threads, call.relu, false, {{call.sizes, {}, false, call.in, call.out}});
}

}  // namespace

void bind_rnn(py::module_& m) {
  bind_pack<RnnForwardCell>(m, "rnn");
  bind_step(m, "rnn", &step, 1);
  m.def("rnn_forward", &forward);
  m.def("rnn_backward", &backward);
}

}  // namespace pykernels
