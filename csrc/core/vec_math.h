// exp, 2^x, tanh and sigmoid on vec<float> and vec<double>.
//
// Largest error over a dense sweep of floats, and over doubles swept at random, in units in the
// last place of the correctly rounded result (denormal results included), as tests/test_core.py
// measures it:
//
//              exp    exp2_normal   exp2_softmax   tanh   sigmoid
//   bound      1.05   2.5           2.5            2.5    2.5
//
// NaN gives NaN; +-inf give the limits. The polynomials are minimax fits (Remez) to the relative
// error, made for this file; the range reduction is W. J. Cody and W. Waite's ("Software Manual for
// the Elementary Functions", 1980): exp(x) = 2^n exp(r), r = x - n ln 2, |r| <= ln(2) / 2.
#pragma once

#include <limits>

#include "vec.h"

namespace pykernels {

constexpr double kLog2E = 1.4426950408889634074;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
struct math_constants;

template <>
struct math_constants<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f;  // x + kRound - kRound is x to the nearest integer
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
  static constexpr float kExpLow = -105, kExpHigh = 89;  // exp is 0 below and inf above
  static constexpr float kTanhOne = 10;                  // tanh rounds to 1 from here on
  static constexpr float kSigmoidOne = 64;               // and sigmoid
  // (exp(r) - 1 - r) / r^2, highest power first: relative error of exp 3.1e-9.
  static constexpr float kExp[] = {0.00138145401768f, 0.00836874510894f, 0.0416683907835f,
                                   0.16666520399f, 0.499999934321f};
  // 2^r, exact at 0 as the largest weight of a softmax is 1: relative error 9.2e-8.
  static constexpr float kExp2[] = {0.00132647018394f, 0.00967153390259f, 0.0555073399454f,
                                    0.24022241761f,    0.69314697736f,    1.0f};
};

template <>
struct math_constants<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kExpLow = -746, kExpHigh = 710;
  static constexpr double kTanhOne = 20;
  static constexpr double kSigmoidOne = 64;
  // Relative error of exp 5.3e-20.
  static constexpr double kExp[] = {
      2.0826583785305146841e-9, 2.5112084606524842324e-8,  2.7557582278659935356e-7,
      2.7557234727511045223e-6, 0.00002480158692572155269, 0.00019841269896515466487,
      0.0013888888889116359378, 0.0083333333333169823687,  0.041666666666666091979,
      0.16666666666666683487,   0.50000000000000000441};
  // Relative error of 2^r 4.2e-20.
  static constexpr double kExp2[] = {2.5625393233889052072e-11,
                                     4.4565748821483699468e-10,
                                     7.0549745331274745704e-9,
                                     1.0178051914982421426e-7,
                                     1.3215486594665823722e-6,
                                     0.000015252733854377926841,
                                     0.00015403530393641149401,
                                     0.0013333558146392634347,
                                     0.0096181291076283292616,
                                     0.055504108664821687324,
                                     0.24022650695910071508,
                                     0.69314718055994530854,
                                     1.0};
};

// y = the polynomial of each x, highest power first. Step by step for all of them: their chains of
// operations hide each other.
template <class T, int N, int kTerms>
PK_INLINE void polynomial(const vec<T> (&x)[N], const T (&coefficients)[kTerms], vec<T> (&y)[N]) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) y[i] = broadcast(coefficients[0]);
#pragma GCC unroll 16
  for (int k = 1; k < kTerms; ++k)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) y[i] = y[i] * x[i] + coefficients[k];
}

// 2^n for an integer n whose power is a normal number.
template <class T>
PK_INLINE vec<T> power_of_two(vec<int_of<T>> n) {
  return bit_cast<vec<T>>((n + math_constants<T>::kBias) << math_constants<T>::kMantissa);
}

// x 2^n, right into the denormals: in two steps, as 2^n alone may be out of range.
template <class T>
PK_INLINE vec<T> scale_by_power(vec<T> x, vec<int_of<T>> n) {
  const auto half = n >> 1;
  return x * power_of_two<T>(half) * power_of_two<T>(n - half);
}

// exp of several registers: x to exp(r) - 1, exp(x) = 2^n exp(r), and `integer` to the bits of the
// number n + `bias` + kRound, whose low ones are n + bias. Step by step for all of them: their
// chains of operations hide each other.
template <class T, int N>
PK_INLINE void reduce_exp(vec<T> (&x)[N], vec<int_of<T>> (&integer)[N], T bias) {
  using C = math_constants<T>;
  const vec<T> magic = broadcast(C::kRound + bias);
  vec<T> n[N], y[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) n[i] = x[i] * T(kLog2E) + magic;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) integer[i] = bit_cast<vec<int_of<T>>>(n[i]);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) n[i] -= magic;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] -= n[i] * C::kLn2High;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] -= n[i] * C::kLn2Low;
  polynomial<T>(x, C::kExp, y);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] += x[i] * x[i] * y[i];
}

template <class T>
PK_INLINE vec<T> exp(vec<T> x) {
  using C = math_constants<T>;
  vec<T> tail[1] = {min(broadcast(C::kExpHigh), max(broadcast(C::kExpLow), x))};
  vec<int_of<T>> n[1];
  reduce_exp<T>(tail, n, T(0));
  return scale_by_power<T>(1 + tail[0], n[0] - bit_cast<vec<int_of<T>>>(broadcast(C::kRound)));
}

// exp2 of several registers: x to 2^r, r = x - n and |r| <= 1/2, and `power` to the low bits of the
// integer n + `bias` where a number has its exponent. Step by step for all of them: their chains of
// operations hide each other.
template <class T, int N>
PK_INLINE void reduce_exp2(vec<T> (&x)[N], vec<int_of<T>> (&power)[N], T bias) {
  using C = math_constants<T>;
  const vec<T> magic = broadcast(C::kRound + bias);
  vec<T> shifted[N], y[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) shifted[i] = x[i] + magic;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] -= shifted[i] - magic;
  polynomial<T>(x, C::kExp2, y);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    power[i] = bit_cast<vec<int_of<T>>>(shifted[i]) << C::kMantissa;
    x[i] = y[i];
  }
}

// exp2 where it is a normal number, of finite x: n is added to the exponent's bits.
template <class T, int N>
PK_INLINE void exp2_normal(vec<T> (&x)[N]) {
  vec<int_of<T>> n[N];
  reduce_exp2<T>(x, n, T(0));
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = bit_cast<vec<T>>(bit_cast<vec<int_of<T>>>(x[i]) + n[i]);
}

// exp2 for softmax: x <= kBias only, and 0 may stand for what is no normal number. The bits of 2^n
// are n's with the bias; where they are 0, at the least x, the power is.
template <class T, int N>
PK_INLINE void exp2_softmax(vec<T> (&x)[N]) {
  constexpr T bias = math_constants<T>::kBias;
  vec<int_of<T>> power[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = max(broadcast(-bias), x[i]);
  reduce_exp2<T>(x, power, bias);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] *= bit_cast<vec<T>>(power[i]);
}

template <class T>
PK_INLINE vec<T> exp2_softmax(vec<T> x) {
  vec<T> one[1] = {x};
  exp2_softmax<T>(one);
  return one[0];
}

template <class T>
PK_INLINE vec<int_of<T>> sign_bit() {
  return vec<int_of<T>>{} + (int_of<T>(1) << (8 * sizeof(T) - 1));
}

// -|x|
template <class T>
PK_INLINE vec<T> negative_magnitude(vec<T> x) {
  return bit_cast<vec<T>>(bit_cast<vec<int_of<T>>>(x) | sign_bit<T>());
}

// tanh |x| = -e / (e + 2) with e = exp(-2|x|) - 1: no cancellation at either end.
template <class T, int N>
PK_INLINE void tanh(vec<T> (&x)[N]) {
  using C = math_constants<T>;
  vec<T> e[N];
  vec<int_of<T>> n[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    e[i] = max(broadcast(-2 * C::kTanhOne), 2 * negative_magnitude<T>(x[i]));
  reduce_exp<T>(e, n, T(C::kBias));
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const vec<T> power = bit_cast<vec<T>>(n[i] << C::kMantissa);
    e[i] = power * e[i] + (power - 1);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) e[i] = -e[i] / (e[i] + 2);
  const auto sign = sign_bit<T>();
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    x[i] = bit_cast<vec<T>>((bit_cast<vec<int_of<T>>>(e[i]) & ~sign) |
                            (bit_cast<vec<int_of<T>>>(x[i]) & sign));
}

template <class T>
PK_INLINE vec<T> tanh(vec<T> x) {
  vec<T> one[1] = {x};
  tanh<T>(one);
  return one[0];
}

// 1 / (1 + exp(-x)); 0 from where 2^n is infinite, as the result is no normal number there.
template <class T, int N>
PK_INLINE void sigmoid(vec<T> (&x)[N]) {
  using C = math_constants<T>;
  vec<int_of<T>> n[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    x[i] = min(broadcast(C::kExpHigh), max(broadcast(-C::kSigmoidOne), -x[i]));
  reduce_exp<T>(x, n, T(C::kBias));
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = 1 + (1 + x[i]) * bit_cast<vec<T>>(n[i] << C::kMantissa);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = 1 / x[i];
}

}  // namespace pykernels
