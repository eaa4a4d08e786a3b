// What Python calls: attention_forward.cpp and attention_backward.cpp by the dtype.
#include <vector>

#include "attention_bind.h"

namespace pykernels {
namespace {

// AttentionRows [2, rows] where a log-sum-exp stands for them.
template <class T>
std::vector<T> from_lse(const T* lse, int64_t rows, T unit) {
  std::vector<T> made(2 * rows, T(1));
  for (int64_t i = 0; i < rows; ++i)
    made[i] = lse[i] == -kInfinity<T> ? kInfinity<T> : lse[i] / unit;
  return made;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward",
        [](int dtype, int threads, const AttentionNumbers& n, const AttentionReals& reals,
           const AttentionRuleGiven& given, const std::array<StridedHeads, 3>& in,
           const StridedHeads& out, Address lse, Address rows) {
          dispatch(dtype, [&](auto tag) {
            using S = typename decltype(tag)::type;
            using T = compute_t<S>;
            AttentionForward<S> p{};
            take_inputs<S>(n, reals, given, in.data(), &p);
            p.out = strided_heads<S>(out, nullptr);
            p.lse = pointer<T>(lse);
            p.rows = attention_rows(pointer<T>(rows), n[0] * n[1] * n[3]);
            attention_forward<S>(threads, p);
          });
        });
  // Rows are what forward left if the keys are `whole`, and otherwise a log-sum-exp.
  m.def("attention_backward",
        [](int dtype, int threads, const AttentionNumbers& n, const AttentionReals& reals,
           const AttentionRuleGiven& given, const std::array<StridedHeads, 5>& in, Address rows,
           bool whole, Address dlse, const std::array<StridedHeads, 3>& grads,
           const StridedHeads& dmask, Address dsinks) {
          dispatch(dtype, [&](auto tag) {
            using S = typename decltype(tag)::type;
            using T = compute_t<S>;
            AttentionBackward<S> p{};
            take_inputs<S>(n, reals, given, in.data(), &p);
            take_gradients<S>(in.data(), dlse, grads, dsinks, &p);
            const int64_t count = n[0] * n[1] * n[3];
            std::vector<T> made;
            if (!whole) made = from_lse(pointer<const T>(rows), count, score_unit(p.sizes, p.rule));
            p.rows = attention_rows(whole ? pointer<const T>(rows) : made.data(), count);
            p.whole = whole;
            p.dmask = strided_heads<T>(dmask, nullptr);
            attention_backward<S>(threads, p);
          });
        });
}

}  // namespace pykernels
