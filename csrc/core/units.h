// What a recurrent cell computes with: one number for each unit of a panel.
//
// That is several registers at a time: a sigmoid or tanh is a long chain of operations, and those
// of two registers hide each other's time.
#pragma once

#include "gemm.h"
#include "vec_math.h"

namespace pykernels {

template <class T>
struct Units {
  vec<T> part[kPanelVecs];

  PK_INLINE Units& operator+=(Units b) { return *this = *this + b; }
};

// Of the panel at p the first `count`, all from kPanel on; the others load as zero and are not
// stored.
template <class S, class T = compute_t<S>>
PK_INLINE Units<T> load_units(const S* p, int64_t count = kPanel<T>) {
  Units<T> x;
#pragma GCC unroll 2
  for (int i = 0; i < kPanelVecs; ++i) x.part[i] = load_n(p + i * lanes<T>, count - i * lanes<T>);
  return x;
}

template <class S, class T = compute_t<S>>
PK_INLINE void store_units(S* p, Units<T> x, int64_t count = kPanel<T>) {
#pragma GCC unroll 2
  for (int i = 0; i < kPanelVecs; ++i) store_n(p + i * lanes<T>, x.part[i], count - i * lanes<T>);
}

// operation(a, more ...) of each register.
template <class T, class Operation, class... More>
PK_INLINE Units<T> for_units(const Operation& operation, Units<T> a, More... more) {
#pragma GCC unroll 2
  for (int i = 0; i < kPanelVecs; ++i) a.part[i] = operation(a.part[i], more.part[i]...);
  return a;
}

template <class T>
PK_INLINE Units<T> operator+(Units<T> a, Units<T> b) {
  return for_units([](vec<T> x, vec<T> y) { return x + y; }, a, b);
}
template <class T>
PK_INLINE Units<T> operator-(Units<T> a, Units<T> b) {
  return for_units([](vec<T> x, vec<T> y) { return x - y; }, a, b);
}
template <class T>
PK_INLINE Units<T> operator*(Units<T> a, Units<T> b) {
  return for_units([](vec<T> x, vec<T> y) { return x * y; }, a, b);
}
template <class T>
PK_INLINE Units<T> one_minus(Units<T> a) {
  return for_units([](vec<T> x) { return 1 - x; }, a);
}
template <class T>
PK_INLINE Units<T> tanh(Units<T> x) {
  tanh<T>(x.part);
  return x;
}
template <class T>
PK_INLINE Units<T> sigmoid(Units<T> x) {
  sigmoid<T>(x.part);
  return x;
}

}  // namespace pykernels
