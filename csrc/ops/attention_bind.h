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

// What every pass takes, into parameters whose packing is there. `in` is q, k, v and what follows.
template <class S, class Params>
void take_inputs(const AttentionNumbers& n, const AttentionReals& reals,
                 const AttentionRuleGiven& given, const StridedHeads* in, Params* p) {
  p->sizes = attention_sizes(n, reals);
  p->rule = attention_rule<S>(given, reals);
  p->q = strided_heads<const S>(in[0], p->packing.queries);
  p->k = strided_heads<const S>(in[1], p->packing.keys);
  p->v = strided_heads<const S>(in[2], p->packing.keys);
}

// And what a backward pass takes besides: behind v come out and dout; `grads` are dq, dk, dv.
template <class S>
void take_gradients(const StridedHeads* in, Address dlse, const std::array<StridedHeads, 3>& grads,
                    Address dsinks, AttentionBackward<S>* p) {
  p->out = strided_heads<const S>(in[3], p->packing.queries);
  p->dout = strided_heads<const S>(in[4], p->packing.queries);
  p->dlse = pointer<const compute_t<S>>(dlse);
  p->dq = strided_heads<S>(grads[0], p->packing.queries);
  p->dk = strided_heads<S>(grads[1], p->packing.keys);
  p->dv = strided_heads<S>(grads[2], p->packing.keys);
  p->dsinks = pointer<S>(dsinks);
}

}  // namespace pykernels
