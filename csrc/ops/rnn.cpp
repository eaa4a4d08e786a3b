// h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), f = tanh or relu, over a whole sequence.
#include "../core/vec_math.h"
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

  PK_INLINE vec<T> state(const ForwardStep<T>& step, int64_t row, int64_t unit, int64_t,
                         const T* product) const {
    const vec<T> input = load(step.input + row * step.input_row + unit);
    const vec<T> a = input + load(product) + load(step.bias + unit);
    return relu ? select<vec<T>>(a < 0, vec<T>{}, a) : tanh<T>(a);
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
                       vec<T> dh, T* to) const {
    const vec<T> h = load_n(y + (step.first + row) * delta_row + unit, count);
    store_n(to, relu ? select<vec<T>>(h > 0, dh, vec<T>{}) : dh * (1 - h * h), count);
  }
  vec<T> rest(int64_t, int64_t, int64_t) const { return vec<T>{}; }
  std::vector<DeltaPiece> pieces() const { return {{0, delta_row, 0}}; }
};

template <class S>
void forward(int threads, const RecurrentForward<S>& p, bool relu) {
  run_forward<S>(threads, p, RnnForwardCell<compute_t<S>>{relu});
}

template <class S>
void backward(int threads, const RecurrentBackward<S>& p, bool relu) {
  run_backward<S>(threads, p, RnnBackwardCell<compute_t<S>, S>{relu, p.sizes.H, p.y});
}

void step(const StepCall& call) {
  const Batch batch(call.sizes, {}, false);
  dispatch(call.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    forward<S>(call.threads, recurrent_forward<S>(call.sizes, batch, call.in, call.out), call.relu);
  });
}

}  // namespace

void bind_rnn(py::module_& m) {
  bind_pack<RnnForwardCell>(m, "rnn");
  bind_step(m, "rnn", &step, 1);
  m.def("kept_row", &kept_row);  // of gru and lstm
  m.def("rnn_forward", [](int dtype, int threads, const RecurrentShape& n,
                          const std::vector<int64_t>& batch_sizes, bool reverse, bool relu,
                          const std::array<Address, 8>& in, const std::array<Address, 2>& out) {
    const Batch batch(n, batch_sizes, reverse);
    dispatch(dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      forward<S>(threads, recurrent_forward<S>(n, batch, in, out), relu);
    });
  });
  m.def("rnn_backward", [](int dtype, int threads, const RecurrentShape& n,
                           const std::vector<int64_t>& batch_sizes, bool reverse, bool relu,
                           const std::array<Address, 8>& in, const std::array<Address, 7>& out) {
    const Batch batch(n, batch_sizes, reverse);
    dispatch(dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      backward<S>(threads, recurrent_backward<S>(n, batch, in, out), relu);
    });
  });
}

}  // namespace pykernels
