// What Python calls: attention_forward.cpp and attention_backward.cpp by the dtype.
#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "../bind.h"
#include "attention_tiles.h"

namespace pykernels {
namespace {

using Sizes = std::array<int64_t, 10>;  // of AttentionSizes, in its order
using Reals = std::array<double, 3>;    // the scale, the softcap, the share of weights dropped
using Strided = std::pair<Address, std::array<int64_t, 3>>;
using StridedMask = std::tuple<int, Address, std::array<int64_t, 4>>;
// The members of AttentionPacking and of AttentionPages, in their order.
using Packing = std::tuple<Address, Address, Address, int64_t, int64_t, bool>;
using Pages = std::tuple<Address, int64_t, int64_t>;
// The mask, the sinks, the slopes with the stride of their sequences, the seed.
using Rule = std::tuple<StridedMask, Address, std::pair<Address, int64_t>, Address>;

AttentionSizes sizes(const Sizes& n, const Reals& reals) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], reals[0], reals[1]};
}

AttentionPacking packing(const Packing& from) {
  const auto& [queries, keys, used, longest_q, longest_k, ends_meet] = from;
  return {pointer<int64_t>(queries),
          pointer<int64_t>(keys),
          pointer<int64_t>(used),
          longest_q,
          longest_k,
          ends_meet};
}

AttentionPages pages(const Pages& from) {
  const auto& [table, per_sequence, size] = from;
  return {pointer<int64_t>(table), per_sequence, size};
}

AttentionMask mask(const StridedMask& from) {
  const auto& [kind, data, strides] = from;
  return {static_cast<AttentionMask::Kind>(kind),
          pointer<const void>(data),
          strides[0],
          strides[1],
          strides[2],
          strides[3]};
}

template <class S>
AttentionRule<S> rule(const Rule& from, const Reals& reals) {
  const auto& [masked, sinks, slopes, seed] = from;
  return {mask(masked),  pointer<const S>(sinks), pointer<compute_t<S>>(slopes.first),
          slopes.second, pointer<int64_t>(seed),  reals[2]};
}

template <class S>
Heads<S> heads(const Strided& rows, const int64_t* starts) {
  const auto& [data, strides] = rows;
  return {pointer<S>(data), strides[0], strides[1], strides[2], starts};
}

// From [2, rows].
template <class T>
AttentionRows<T> rows_of(T* data, const Sizes& n, const AttentionPacking& packed) {
  if (!data) return {nullptr, nullptr};
  return {data, data + (packed.queries ? 1 : n[0]) * n[1] * n[3]};
}

// The same, where a log-sum-exp stands for them.
template <class T>
std::vector<T> from_lse(const T* lse, const Sizes& n, T unit) {
  const int64_t rows = n[0] * n[1] * n[3];
  std::vector<T> made(2 * rows, T(1));
  for (int64_t i = 0; i < rows; ++i)
    made[i] = lse[i] == -kInfinity<T> ? kInfinity<T> : lse[i] / unit;
  return made;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward", [](int dtype, int threads, const Sizes& n, const Reals& reals,
                                const Packing& packed, const Rule& given,
                                const std::array<Strided, 3>& in, const Pages& paged,
                                const Strided& out, Address lse, Address rows) {
    dispatch(dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      using T = compute_t<S>;
      const AttentionPacking at = packing(packed);
      attention_forward<S>(
          threads, {sizes(n, reals), at, rule<S>(given, reals), heads<const S>(in[0], at.queries),
                    heads<const S>(in[1], at.keys), heads<const S>(in[2], at.keys), pages(paged),
                    heads<S>(out, at.queries), pointer<T>(lse), rows_of(pointer<T>(rows), n, at)});
    });
  });
  // Rows are what forward left if the keys are `whole`, and otherwise a log-sum-exp.
  m.def(
      "attention_backward",
      [](int dtype, int threads, const Sizes& n, const Reals& reals, const Packing& packed,
         const Rule& given, const std::array<Strided, 5>& in, Address rows, bool whole,
         Address dlse, const std::array<Strided, 3>& grads, const Strided& dmask, Address dsinks) {
        dispatch(dtype, [&](auto tag) {
          using S = typename decltype(tag)::type;
          using T = compute_t<S>;
          const AttentionPacking at = packing(packed);
          const AttentionRule<S> weights = rule<S>(given, reals);
          std::vector<T> made;
          if (!whole)
            made = from_lse(pointer<const T>(rows), n, score_unit(sizes(n, reals), weights));
          attention_backward<S>(
              threads, {sizes(n, reals), at, weights, heads<const S>(in[0], at.queries),
                        heads<const S>(in[1], at.keys), heads<const S>(in[2], at.keys),
                        heads<const S>(in[3], at.queries),
                        rows_of(whole ? pointer<const T>(rows) : made.data(), n, at), whole,
                        heads<const S>(in[4], at.queries), pointer<T>(dlse),
                        heads<S>(grads[0], at.queries), heads<S>(grads[1], at.keys),
                        heads<S>(grads[2], at.keys), heads<T>(dmask, nullptr), pointer<S>(dsinks)});
        });
      });
}

}  // namespace pykernels
