// The vector type that kernels are written in, and the only file that knows an instruction set.
//
// vec<T> is one register of T: 16 bytes on the baseline build, 32 with AVX2, 64 with AVX-512. It is
// the compiler's own vector type, so + - * / < ?: work lane by lane. Every name here is inline and
// lives in a shared object built for one instruction set; nothing is shared between those.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define PK_INLINE inline __attribute__((always_inline))

namespace pykernels {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
constexpr int kVecRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
constexpr int kVecRegisters = 16;
#else
constexpr int kVecBytes = 16;
constexpr int kVecRegisters = 16;
#endif

// Whether a multiply-add is one instruction, which rounds once.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

template <class T>
struct vec_types {
  typedef T value __attribute__((vector_size(kVecBytes)));
  typedef T unaligned __attribute__((vector_size(kVecBytes), aligned(alignof(T)), may_alias));
};

template <class T>
using vec = typename vec_types<T>::value;

template <class T>
constexpr int lanes = kVecBytes / static_cast<int>(sizeof(T));

template <class V>
using lane_t = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V&>()[0])>>;

// The integer of a lane's width: what comparisons give, and what exponents are built in.
template <class T>
using int_of = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class V>
using int_vec = vec<int_of<lane_t<V>>>;

// 16-bit storage; arithmetic on it is float's.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type that arithmetic on elements stored as S runs in.
template <class S>
using compute_t = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class T>
PK_INLINE vec<T> broadcast(T x) {
  return x - vec<T>{};  // x - 0 is x, -0 included; x + 0 is not
}

template <class V>
PK_INLINE V select(int_vec<V> mask, V yes, V no) {
  return mask ? yes : no;
}

template <class To, class From>
PK_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

#if defined(__AVX512F__)
// The masked forms, of every lane: the plain ones draw warnings inside GCC 12's own headers.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

// The second argument where the two are equal or either is NaN, as the hardware has it.
template <class V>
PK_INLINE V max(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(lane_t<V>) == 4)
    return (V)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
  else return (V)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(lane_t<V>) == 4) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  else return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

template <class V>
PK_INLINE V min(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(lane_t<V>) == 4)
    return (V)_mm512_maskz_min_ps(kAllLanes, (__m512)a, (__m512)b);
  else return (V)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(lane_t<V>) == 4) return (V)_mm256_min_ps((__m256)a, (__m256)b);
  else return (V)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

// ---- 16-bit storage, one element ----------------------------------------------------------------

PK_INLINE float widen(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
PK_INLINE float widen(float x) { return x; }
PK_INLINE double widen(double x) { return x; }
inline float widen(f16 x) {
  // Shift exponent and fraction into place, then move the exponent's bias.
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  if (magnitude >= 0x0f800000u) return bit_cast<float>(sign | magnitude | 0x7f800000u);
  // A subnormal half: 2^-14 joins and leaves, as a denormal float may count as zero here.
  if (magnitude < 0x00800000u)
    return bit_cast<float>(sign |
                           bit_cast<uint32_t>(bit_cast<float>(magnitude + 0x38800000u) - 0x1p-14f));
  return bit_cast<float>(sign | (magnitude + 0x38000000u));
}

// Round to nearest, ties to even, in both.
PK_INLINE void narrow(float x, float* to) { *to = x; }
PK_INLINE void narrow(double x, double* to) { *to = x; }
PK_INLINE void narrow(float x, bf16* to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40u : rounded);
}
inline void narrow(float x, f16* to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds past 65504
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // A subnormal half: adding 0.5 leaves its bits, rounded, at the end of the fraction.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

// ---- loads and stores of one register, from any storage, at any alignment -----------------------

PK_INLINE vec<float> load(const float* p) { return *(const vec_types<float>::unaligned*)p; }
PK_INLINE vec<double> load(const double* p) { return *(const vec_types<double>::unaligned*)p; }
PK_INLINE void store(float* p, vec<float> v) { *(vec_types<float>::unaligned*)p = v; }
PK_INLINE void store(double* p, vec<double> v) { *(vec_types<double>::unaligned*)p = v; }

typedef uint16_t half_bits __attribute__((vector_size(kVecBytes / 2)));
typedef uint32_t word_bits __attribute__((vector_size(kVecBytes)));

PK_INLINE vec<float> load(const bf16* p) {
  half_bits bits;
  std::memcpy(&bits, p, sizeof bits);
  // One instruction, where GCC 12 makes five of the conversion.
#if defined(__AVX512F__)
  const word_bits words = (word_bits)_mm512_maskz_cvtepu16_epi32(kAllLanes, (__m256i)bits);
#elif defined(__AVX2__)
  const word_bits words = (word_bits)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  const word_bits words = __builtin_convertvector(bits, word_bits);
#endif
  return bit_cast<vec<float>>(words << 16);
}

// The bits of each lane as bf16, in the lower half.
PK_INLINE word_bits narrow_to_bf16(vec<float> v) {
  const word_bits bits = bit_cast<word_bits>(v);
  const word_bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const word_bits nan = (bits >> 16) | 0x40u;
  return v != v ? nan : rounded;
}

PK_INLINE void store(bf16* p, vec<float> v) {
  const half_bits out = __builtin_convertvector(narrow_to_bf16(v), half_bits);
  std::memcpy(p, &out, sizeof out);
}

PK_INLINE vec<float> load(const f16* p) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vec<float> v{};
  for (int i = 0; i < lanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

PK_INLINE void store(f16* p, vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p,
                      _mm512_maskz_cvtps_ph(kAllLanes, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < lanes<float>; ++i) narrow(v[i], &p[i]);
#endif
}

// The first n lanes, all from n = lanes on and none below 1; the others load as zero and are not
// stored.
template <class S>
PK_INLINE vec<compute_t<S>> load_n(const S* p, int64_t n) {
  constexpr int width = lanes<compute_t<S>>;
  if (n >= width) return load(p);
  S padded[width] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}

template <class S>
PK_INLINE void store_n(S* p, vec<compute_t<S>> v, int64_t n) {
  constexpr int width = lanes<compute_t<S>>;
  if (n >= width) return store(p, v);
  S padded[width];
  store(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

// Two registers of the elements from p on, in an order of the storage's own: to be stored as a
// pair, or multiplied by what was loaded as one. Of bf16 these are the even and the odd elements,
// which widen with one operation each where they lie; in order, each register takes two on busier
// units.
template <class T>
struct vec_pair {
  vec<T> first, second;
};

template <class S, class T = compute_t<S>>
PK_INLINE vec_pair<T> load_pair(const S* p) {
  return {load(p), load(p + lanes<T>)};
}

template <class S, class T = compute_t<S>>
PK_INLINE void store_pair(S* p, vec_pair<T> v) {
  store(p, v.first);
  store(p + lanes<T>, v.second);
}

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
PK_INLINE vec_pair<float> load_pair(const bf16* p) {
  word_bits words;
  std::memcpy(&words, p, sizeof words);
  return {bit_cast<vec<float>>(words << 16), bit_cast<vec<float>>(words & 0xffff0000u)};
}

PK_INLINE void store_pair(bf16* p, vec_pair<float> v) {
  const word_bits words = narrow_to_bf16(v.first) | narrow_to_bf16(v.second) << 16;
  std::memcpy(p, &words, sizeof words);
}
#endif

// Asks for the cache line at p. GCC takes a function that does nothing else for one without effect
// and drops the call; the empty statement keeps it.
PK_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p);
  asm volatile("");
}

// The same for what is wanted later: as far as the second-level cache, where it drives nothing out
// of the first.
PK_INLINE void prefetch_far(const void* p) {
  __builtin_prefetch(p, 0, 2);
  asm volatile("");
}

// ---- across lanes -------------------------------------------------------------------------------

namespace detail {

// The lanes of a, and behind them those of b, by number.
template <int... I, class V>
PK_INLINE V shuffle(V a, V b) {
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
  return __builtin_shuffle(a, b, int_vec<V>{I...});
#else
  return __builtin_shufflevector(a, b, I...);
#endif
}

// Of a and b, lane by lane: with kHigh false, a's lanes whose index has no bit kBit, and beside
// them b's; with kHigh true, those that have it.
template <int kBit, bool kHigh, class V, int... I>
PK_INLINE V exchange(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return shuffle<(kHigh ? (I & kBit ? I + n : I + kBit) : (I & kBit ? I - kBit + n : I))...>(a, b);
}

template <int kBit, class V>
PK_INLINE void transpose_bit(V* rows) {
  constexpr int n = lanes<lane_t<V>>;
  if constexpr (kBit < n) {
    using Lanes = std::make_integer_sequence<int, n>;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & kBit) continue;
      const V low = exchange<kBit, false>(rows[i], rows[i + kBit], Lanes{});
      rows[i + kBit] = exchange<kBit, true>(rows[i], rows[i + kBit], Lanes{});
      rows[i] = low;
    }
    transpose_bit<2 * kBit>(rows);
  }
}

// The sums of rows over pairs of lanes, and pairs of those: half as many rows each time.
template <int kBit, class V>
PK_INLINE void sum_bit(V* rows) {
  constexpr int n = lanes<lane_t<V>>;
  if constexpr (kBit < n) {
    using Lanes = std::make_integer_sequence<int, n>;
#pragma GCC unroll 16
    for (int i = 0; i < n; i += 2 * kBit)
      rows[i] = exchange<kBit, false>(rows[i], rows[i + kBit], Lanes{}) +
                exchange<kBit, true>(rows[i], rows[i + kBit], Lanes{});
    sum_bit<2 * kBit>(rows);
  }
}

// v with the lanes of each pair that differ in bit kBit swapped.
template <int kBit, class V, int... I>
PK_INLINE V swap_lanes(V v, std::integer_sequence<int, I...>) {
  return shuffle<(I ^ kBit)...>(v, v);
}

template <int kBit, class V, class Combine>
PK_INLINE lane_t<V> reduce(V v, const Combine& combine) {
  constexpr int n = lanes<lane_t<V>>;
  if constexpr (kBit == n) return v[0];
  else
    return reduce<2 * kBit>(combine(v, swap_lanes<kBit>(v, std::make_integer_sequence<int, n>{})),
                            combine);
}

}  // namespace detail

template <class V>
PK_INLINE lane_t<V> reduce_add(V v) {
  return detail::reduce<1>(v, [](V a, V b) { return a + b; });
}

template <class V>
PK_INLINE lane_t<V> reduce_max(V v) {
  return detail::reduce<1>(v, [](V a, V b) { return max(a, b); });
}

// Whether any lane of a comparison holds.
template <class M>
PK_INLINE bool any(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  bool found = false;
  for (int i = 0; i < lanes<lane_t<M>>; ++i) found |= mask[i] != 0;
  return found;
#endif
}

// Swaps rows and lanes of a square of registers: one bit of the two indices at a time.
template <class V>
PK_INLINE void transpose(V (&rows)[lanes<lane_t<V>>]) {
  detail::transpose_bit<1>(rows);
}

// The sum of each row's lanes, that of row i in lane i. Of the rows nothing is left.
template <class V>
PK_INLINE V sum_of_each(V (&rows)[lanes<lane_t<V>>]) {
  detail::sum_bit<1>(rows);
  return rows[0];
}

// ---- the processor ------------------------------------------------------------------------------

// One turn of a loop that waits for another thread.
PK_INLINE void spin_pause() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

// While one lives, this thread takes denormal numbers for zero. A state that decays towards zero
// would otherwise slow every operation on it by up to a hundred times. The caller's mode returns.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : mode_(_mm_getcsr()) { _mm_setcsr(mode_ | 0x8040u); }  // FTZ | DAZ
  ~FlushDenormals() { _mm_setcsr(mode_); }

 private:
  unsigned mode_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace pykernels
