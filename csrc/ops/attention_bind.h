// What the bindings of attention and attention_varlen share: arguments from Python.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <utility>

#include "../bind.h"
#include "attention_tiles.h"

namespace pykernels {

// Of AttentionSizes, in its order.
using AttentionNumbers = std::array<int64_t, 10>;
// The scale, the softcap, the share of weights dropped.
using AttentionReals = std::array<double, 3>;
using StridedHeads = std::pair<Address, std::array<int64_t, 3>>;
using StridedMask = std::tuple<int, Address, std::array<int64_t, 4>>;
// The mask, the sinks, the slopes with the stride of their sequences, the seed.
using AttentionRuleGiven = std::tuple<StridedMask, Address, std::pair<Address, int64_t>, Address>;

inline AttentionSizes attention_sizes(const AttentionNumbers& n, const AttentionReals& reals) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], reals[0], reals[1]};
}

inline AttentionMask attention_mask(const StridedMask& from) {
  const auto& [kind, data, strides] = from;
  return {static_cast<AttentionMask::Kind>(kind),
          pointer<const void>(data),
          strides[0],
          strides[1],
          strides[2],
          strides[3]};
}

template <class S>
AttentionRule<S> attention_rule(const AttentionRuleGiven& from, const AttentionReals& reals) {
  const auto& [masked, sinks, slopes, seed] = from;
  return {attention_mask(masked), pointer<const S>(sinks), pointer<compute_t<S>>(slopes.first),
          slopes.second,          pointer<int64_t>(seed),  reals[2]};
}

template <class S>
Heads<S> strided_heads(const StridedHeads& rows, const int64_t* starts) {
  const auto& [data, strides] = rows;
  return {pointer<S>(data), strides[0], strides[1], strides[2], starts};
}

// From [2, rows].
template <class T>
AttentionRows<T> attention_rows(T* data, int64_t rows) {
  return data ? AttentionRows<T>{data, data + rows} : AttentionRows<T>{};
}

}  // namespace pykernels
