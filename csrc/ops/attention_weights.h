// The weights of attention once more, for its gradient, and the gradient of the scores.
#pragma once

#include "attention_tiles.h"

namespace pykernels {

// Brings the products of query i with `keys` and its row of dP, in whole registers, to P, of which
// dV is made, and dS = P * (dP - delta + dlse), times the scale. Both get zeros where the query
// does not see, whatever was there; no more keys than kKeys.
//
// Of few keys dP and delta are nearly equal, and what they were rounded by would show. So a query
// whose keys are all here gets its delta here, of these very dP: delta = sum P dP. That of others
// is in *delta beforehand, summed in the order of dP, which is the same sum where a query sees one
// key.
template <int64_t kKeys, class S, class T = compute_t<S>>
void weigh_row(const AttentionBackward<S>& p, const AttentionSizes& n, int64_t b, int64_t h,
               int64_t i, Range keys, T* delta, T* weight, T* dscore) {
  alignas(kCacheLine) T growth[kKeys + kRowPad], keep[kKeys + kRowPad];
  const Range mine = visible_keys(n, {i, i + 1}, keys);
  finish_scores(n, p.rule, b, h, i, keys.begin, mine, weight, growth);
  // Whole registers from the one with the first key it sees.
  const int64_t start = mine.begin / lanes<T> * lanes<T>;
  std::fill(weight + start, weight + mine.begin, -kInfinity<T>);
  const int64_t at = row_of(p.sizes, p.packing, b, h, i);
  const vec<T> top = broadcast(p.rows.top[at]), inverse = broadcast(p.rows.inverse[at]);
  if (p.rule.dropout > 0) {
    draw_kept(p.rule, b * n.N + h, i, keys.begin, mine, keep);
    for (int64_t j = mine.begin; j < mine.end; ++j) dscore[j] *= keep[j];
  }
  const T rate = score_unit(n, p.rule) * T(kLog2E);
  const auto weigh = [&](int64_t j) {
    const vec<T> w = exp2_softmax<T>((load(weight + j) - top) * rate) * inverse;
    store(weight + j, w);
    return w;
  };
  // The mask is added to scores that are scaled already: its gradient is dS without the scale.
  const T factor = p.dmask.data ? T(1) : T(n.scale);
  const T dlse = p.dlse ? p.dlse[at] : T(0);
  if (p.whole && mine.size() == visible_keys(n, {i, i + 1}, {0, n.S_k}).size()) {
    // What an unseen key has may be NaN.
    std::fill(dscore + start, dscore + mine.begin, T(0));
    fill(dscore, mine.end, mine.end, T(0));
    fill(weight, mine.end, mine.end, -kInfinity<T>);
    vec<T> total{}, products{};
    for (int64_t j = start; j < mine.end; j += lanes<T>) {
      const vec<T> w = weigh(j);
      total += w;
      products += w * load(dscore + j);
    }
    // All weights add up to 1, but for roundings; a sink's is not among these.
    const T sum = p.rule.sinks ? T(1) : reduce_add(total);
    const T own = sum > 0 ? reduce_add(products) / sum : T(0);
    if (p.dsinks) *delta = own;
    for (int64_t j = start; j < mine.end; j += lanes<T>)
      store(dscore + j, load(weight + j) * (load(dscore + j) - own + dlse) * factor);
  } else {
    const T shift = *delta - dlse;
    for (int64_t j = start; j < mine.end; j += lanes<T>)
      store(dscore + j, weigh(j) * (load(dscore + j) - shift) * factor);
  }
  if (p.rule.dropout > 0)
    for (int64_t j = mine.begin; j < mine.end; ++j) weight[j] *= keep[j];
  if (p.dmask.data) {
    T* const to = p.dmask.at(b, h, i) + keys.begin;
    for (int64_t j = mine.begin; j < mine.end; ++j) to[j] += dscore[j];
    scale_row(dscore + start, mine.end - start, T(n.scale));
  }
  if (n.softcap > 0)
    for (int64_t j = start; j < mine.end; j += lanes<T>)
      store(dscore + j, load(dscore + j) * load(growth + j));
  std::fill(weight, weight + mine.begin, T(0));
  std::fill(dscore, dscore + mine.begin, T(0));
  fill(weight, mine.end, keys.size(), T(0));
  fill(dscore, mine.end, keys.size(), T(0));
}

}  // namespace pykernels
