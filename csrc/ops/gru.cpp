// r, z = sigmoid(W_i x_t + b_i + W_h h_{t-1} + b_h)      n = tanh(W_in x_t + b_in + r hn)
// hn   = W_hn h_{t-1} + b_hn                              h_t = (1 - z) n + z h_{t-1}
//
// over a whole sequence. K. Cho et al., "Learning phrase representations using RNN encoder-decoder"
// (2014), with the reset gate after the product, as torch.nn.GRU has it.
#include "../core/vec_math.h"
#include "recurrent_bind.h"

namespace pykernels {
namespace {

template <class T>
struct GruForwardCell {
  static constexpr int kGates = 3;
  static constexpr T* unprojected = nullptr;
  int64_t H, gate_row;
  T* gates;       // [N, 4 H] where kept: r, z, n and hn
  const T* bias;  // [3 H], without b_hn
  const T* b_hn;  // [H]
  const T* h0;    // [B, H] or nullptr

  PK_INLINE void fetch(const ForwardStep<T>& step, int64_t row, int64_t unit) const {
    for (int g = 0; g < 3; ++g) prefetch(step.gates + row * gate_row + g * H + unit);
  }

  PK_INLINE vec<T> state(const ForwardStep<T>& step, int64_t row, int64_t unit, int64_t count,
                         const T* product) const {
    T* const gate = step.gates + row * gate_row + unit;
    const T* const before = row < step.carried ? step.before : h0;
    const vec<T> h = before ? load_n(before + row * H + unit, count) : vec<T>{};
    const vec<T> r = sigmoid<T>(load_n(gate, count) + load(product));
    const vec<T> z = sigmoid<T>(load_n(gate + H, count) + load(product + kPanel<T>));
    const vec<T> hn = load(product + 2 * kPanel<T>) + load_n(b_hn + unit, count);
    const vec<T> n = tanh<T>(load_n(gate + 2 * H, count) + r * hn);
    if (gates) {
      store_n(gate, r, count);
      store_n(gate + H, z, count);
      store_n(gate + 2 * H, n, count);
      store_n(gate + 3 * H, hn, count);
    }
    return (1 - z) * n + z * h;
  }
};

// delta is [N, 4 H]: the gradients of r and z before their sigmoid, of hn, and of n before its
// tanh.
template <class T, class S>
struct GruBackwardCell {
  static constexpr int kGates = 3;
  static constexpr T* unprojected = nullptr;
  int64_t H, delta_row;
  const T* gates;  // [N, 4 H], of the forward pass
  const S* y;
  const S* h0;  // or nullptr
  T* carry;     // [B, H]: z dh of the step after; zeros at first

  PK_INLINE void fetch(const BackwardStep& step, int64_t row, int64_t unit) const {
    for (int g = 0; g < 4; ++g) prefetch(gates + (step.first + row) * 4 * H + g * H + unit);
    prefetch(y + (step.before + row) * H + unit);
    prefetch(carry + row * H + unit);
  }

  PK_INLINE void delta(const BackwardStep& step, int64_t row, int64_t unit, int64_t count,
                       vec<T> dh, T* to) const {
    const T* const gate = gates + (step.first + row) * 4 * H + unit;
    const vec<T> r = load_n(gate, count), z = load_n(gate + H, count);
    const vec<T> n = load_n(gate + 2 * H, count), hn = load_n(gate + 3 * H, count);
    const S* const before = row < step.n_before ? y + (step.before + row) * H
                            : h0                ? h0 + row * H
                                                : nullptr;
    const vec<T> h = before ? load_n(before + unit, count) : vec<T>{};
    dh += load_n(carry + row * H + unit, count);
    store_n(carry + row * H + unit, z * dh, count);
    const vec<T> dn = dh * (1 - z) * (1 - n * n);
    store_n(to, dn * hn * r * (1 - r), count);
    store_n(to + H, dh * (h - n) * z * (1 - z), count);
    store_n(to + 2 * H, dn * r, count);
    store_n(to + 3 * H, dn, count);
  }
  vec<T> rest(int64_t row, int64_t unit, int64_t count) const {
    return load_n(carry + row * H + unit, count);
  }
  std::vector<DeltaPiece> pieces() const { return {{0, 2 * H, 0}, {3 * H, H, 2 * H}}; }
};

template <class S>
void forward(int threads, const RecurrentForward<S>& p, compute_t<S>* gates) {
  using T = compute_t<S>;
  const int64_t H = p.sizes.H;
  const Scratch<T> bias(3 * H), b_hn(H);
  add_biases(p, 3 * H, 2 * H, bias.get());
  for (int64_t i = 0; i < H; ++i) b_hn.get()[i] = p.b_hh ? widen(p.b_hh[2 * H + i]) : T(0);
  const Widened<T, S> h0(p.h0, p.sizes.B * H);
  run_forward<S>(
      threads, p,
      GruForwardCell<T>{H, gates ? 4 * H : 3 * H, gates, bias.get(), b_hn.get(), h0.get()});
}

template <class S>
void backward(int threads, const RecurrentBackward<S>& p, const compute_t<S>* gates) {
  using T = compute_t<S>;
  const int64_t H = p.sizes.H, states = p.sizes.B * H;
  const Scratch<T> carry(states);
  std::fill_n(carry.get(), states, T(0));
  run_backward<S>(threads, p, GruBackwardCell<T, S>{H, 4 * H, gates, p.y, p.h0, carry.get()});
}

}  // namespace

void bind_gru(py::module_& m) {
  m.def("gru_forward", [](int dtype, int threads, const RecurrentShape& n,
                          const std::vector<int64_t>& batch_sizes, bool reverse,
                          const std::array<Address, 7>& in, const std::array<Address, 2>& out,
                          Address gates) {
    const Batch batch(n, batch_sizes, reverse);
    dispatch(dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      forward<S>(threads, recurrent_forward<S>(n, batch, in, out), pointer<compute_t<S>>(gates));
    });
  });
  m.def("gru_backward",
        [](int dtype, int threads, const RecurrentShape& n, const std::vector<int64_t>& batch_sizes,
           bool reverse, const std::array<Address, 8>& in, const std::array<Address, 7>& out,
           Address gates) {
          const Batch batch(n, batch_sizes, reverse);
          dispatch(dtype, [&](auto tag) {
            using S = typename decltype(tag)::type;
            backward<S>(threads, recurrent_backward<S>(n, batch, in, out),
                        pointer<const compute_t<S>>(gates));
          });
        });
}

}  // namespace pykernels
