// Vectors of one register's width, and the functions of the scan on them. Included once per instruction set: every
// name is in a namespace of its own, so that no inline function of one build can be linked into another. The build
// chooses MDNET_NAMESPACE and MDNET_VECTOR_BYTES (CMakeLists.txt).
//
// Written with the vector extensions that GCC (12 and newer) and Clang share; the compiler picks the instructions.
// Relative errors in float32, for results above 1e-36 (tests/mdnet_engines/test_native.py holds them):
//   exp(x) 1.5e-7, softplus(x) 2.5e-7, silu(x) 3e-7, and 8e-8 |x| more where x is negative (x log2(e) is rounded).
// NaN gives NaN; exp(-inf) = 0, exp(inf) = inf, softplus(-inf) = 0, softplus(inf) = inf. Results below 1e-36 may be 0.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#if MDNET_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

namespace MDNET_NAMESPACE {

template <typename T>
struct Traits;

template <>
struct Traits<float> {
  typedef float Vector __attribute__((vector_size(MDNET_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(MDNET_VECTOR_BYTES)));
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kMagic = 0x1.8p23f;  // adding it rounds to an integer, which is then in the low bits
  static constexpr int kAtanhTerms = 7;       // series of log1p: error 1.5e-8
};

template <>
struct Traits<double> {
  typedef double Vector __attribute__((vector_size(MDNET_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(MDNET_VECTOR_BYTES)));
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kMagic = 0x1.8p52;
  static constexpr int kAtanhTerms = 16;  // error 1e-17
};

template <typename T>
using Vector = typename Traits<T>::Vector;
template <typename T>
using Bits = typename Traits<T>::Bits;
template <typename T>
constexpr int kWidth = MDNET_VECTOR_BYTES / sizeof(T);

template <typename T>
inline Vector<T> splat(T value) {
  return value - Vector<T>{};  // not {} + value: that turns -0 into 0, which costs an instruction to keep right
}

template <typename V, typename T>
inline V load(const T* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <typename V, typename T>
inline void store(T* to, V value) {
  memcpy(to, &value, sizeof value);
}

// With a NaN in `a` both of these give `a`.
template <typename V>
inline V at_least(V a, V low) {
  return a < low ? low : a;
}
template <typename V>
inline V at_most(V a, V high) {
  return a > high ? high : a;
}
#if MDNET_VECTOR_BYTES == 64  // compilers make two instructions of the above
inline Vector<float> at_least(Vector<float> a, Vector<float> low) { return _mm512_maskz_max_ps(0xffff, low, a); }
inline Vector<float> at_most(Vector<float> a, Vector<float> high) { return _mm512_maskz_min_ps(0xffff, high, a); }
#elif MDNET_VECTOR_BYTES == 32
inline Vector<float> at_least(Vector<float> a, Vector<float> low) { return _mm256_max_ps(low, a); }
inline Vector<float> at_most(Vector<float> a, Vector<float> high) { return _mm256_min_ps(high, a); }
#endif

// 1 / a for a >= 1 (infinity and NaN included).
template <typename T>
inline Vector<T> reciprocal(Vector<T> a) {
#if MDNET_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {  // a quarter of a division's time; error 1.2e-7
    const __m512 x = _mm512_maskz_rcp14_ps(0xffff, a);
    const __m512 error = _mm512_fnmadd_ps(a, x, _mm512_set1_ps(1.0f));
    // Newton's step, but not at infinity, where 0 is right already and inf * 0 would come in.
    return Vector<T>(_mm512_mask_fmadd_ps(x, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ), error, x));
  }
#endif
  return T(1) / a;
}

// 2^r for |r| <= 1/2, exactly 1 at 0 (a state that hardly decays must not drift). float: minimax, error 7.2e-8.
inline Vector<float> exp2_fraction(Vector<float> r) {
  Vector<float> p = splat(0.0013283392f);
  p = p * r + 0.0096742986f;
  p = p * r + 0.0555067808f;
  p = p * r + 0.2402218133f;
  p = p * r + 0.6931470037f;
  return p * r + 1.0f;
}

// double: Taylor's series, error 4e-18.
inline Vector<double> exp2_fraction(Vector<double> r) {
  constexpr int kTerms = 14;
  constexpr double kLn2 = 0.69314718055994530942;
  const Vector<double> x = r * kLn2;
  Vector<double> p = splat(1.0);
  for (int k = kTerms; k >= 1; --k) p = p * (x * (1.0 / k)) + 1.0;
  return p;
}

// 2^(a b) where |a b| < 2^21 in every lane, or, unless `Bounded`, anything.
template <bool Bounded, typename T>
inline Vector<T> exp2_product(Vector<T> a, Vector<T> b) {
  using R = Traits<T>;
#if MDNET_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {  // scalef saturates to 0 and inf by itself
    Vector<T> x = a * b;
    if constexpr (!Bounded) x = at_most(at_least(x, splat<T>(-300)), splat<T>(300));
    const Vector<T> k = (x + R::kMagic) - R::kMagic;
    return Vector<T>(_mm512_maskz_scalef_ps(0xffff, __m512(exp2_fraction(x - k)), __m512(k)));
  }
#endif
  // 2^k is assembled in the exponent's bits: 0 for the lowest k, inf for the highest.
  const Vector<T> x = at_most(at_least(a * b, splat<T>(-R::kBias)), splat<T>(R::kBias + 1));
  const Vector<T> shifted = x + R::kMagic;
  const Vector<T> k = shifted - R::kMagic;
  Bits<T> bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + R::kBias) << R::kMantissa;
  Vector<T> power;
  memcpy(&power, &bits, sizeof power);
  return exp2_fraction(x - k) * power;
}

template <typename T>
inline Vector<T> exp_of(Vector<T> x) {
  return exp2_product<false, T>(x, splat<T>(T(1.44269504088896340736)));
}

// log(1 + e) for 0 <= e <= 1 as 2 atanh(e / (2 + e)), accurate relative to the result down to e = 0.
template <typename T>
inline Vector<T> log1p_of(Vector<T> e) {
  const Vector<T> s = e * reciprocal<T>(e + T(2));
  const Vector<T> square = s * s;
  Vector<T> p = splat(T(1) / (2 * Traits<T>::kAtanhTerms - 1));
  for (int k = Traits<T>::kAtanhTerms - 1; k >= 1; --k) p = p * square + T(1) / (2 * k - 1);
  return T(2) * s * p;
}

template <typename T>
inline Vector<T> softplus(Vector<T> x) {
  // exp takes -|x|; a NaN comes through both terms.
  return at_least(x, Vector<T>{}) + log1p_of<T>(exp_of<T>(at_most(x, -x)));
}

template <typename T>
inline Vector<T> sigmoid(Vector<T> x) {
  return reciprocal<T>(T(1) + exp_of<T>(-x));
}

template <typename T>
inline Vector<T> silu(Vector<T> x) {
  return x * sigmoid<T>(x);
}

// Half types have no arithmetic here: values are converted where they are read and written.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(Bfloat value) { return as_float(uint32_t(value.bits) << 16); }
inline float widen(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127, subnormals included.
  const float scaled = as_float(rest << 13) * 0x1p112f;
  const uint32_t bits = rest >= 0x7c00 ? 0x7f800000 | (rest << 13) : as_bits(scaled);
  return as_float(bits | sign);
}

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(double value, double* to) { *to = value; }
inline void narrow(float value, Bfloat* to) {
  const uint32_t bits = as_bits(value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = uint16_t(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float value, Half* to) {
  const uint32_t sign = (as_bits(value) >> 16) & 0x8000, bits = as_bits(value) & 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (bits >= 0x477ff000) {
    half = 0x7c00;  // rounds to more than 65504
  } else if (bits < 0x38800000) {
    half = as_bits(as_float(bits) + 0.5f) - 0x3f000000;  // subnormal: the addition rounds to a multiple of 2^-24
  } else {
    half = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  to->bits = uint16_t(half | sign);
}

// `count` elements (kWidth at most) of a row, 0 behind them.
template <typename T, typename IO>
inline Vector<T> read(const IO* from, int64_t count) {
  if constexpr (sizeof(T) == sizeof(IO)) {
    if (count >= kWidth<T>) return load<Vector<T>>(from);
#if MDNET_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) return Vector<T>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
#endif
  }
  Vector<T> value{};
  for (int i = 0; i < kWidth<T> && i < count; ++i) value[i] = widen(from[i]);
  return value;
}

template <typename T, typename IO>
inline void write(IO* to, Vector<T> value, int64_t count) {
  if constexpr (sizeof(T) == sizeof(IO)) {
    if (count >= kWidth<T>) return store(to, value);
#if MDNET_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), value);
#endif
  }
  for (int i = 0; i < kWidth<T> && i < count; ++i) narrow(value[i], to + i);
}

// Lanes of `a` and `b` in blocks of Step: the even blocks of both (High = false) or the odd ones.
template <int Step, bool High, typename V, size_t... I>
inline V blocks(V a, V b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  if constexpr (High) {
    return __builtin_shufflevector(a, b, (int(I) & Step ? n + int(I) : int(I) + Step)...);
  } else {
    return __builtin_shufflevector(a, b, (int(I) & Step ? n + int(I) - Step : int(I))...);
  }
}

template <int Step, typename V, int N>
inline void transpose_stage(V (&rows)[N]) {
  if constexpr (Step < N) {
    using All = std::make_index_sequence<N>;
    for (int i = 0; i < N; ++i) {
      if (i & Step) continue;
      const V a = rows[i], b = rows[i + Step];
      rows[i] = blocks<Step, false>(a, b, All{});
      rows[i + Step] = blocks<Step, true>(a, b, All{});
    }
    transpose_stage<2 * Step>(rows);
  }
}

// rows[i][j] becomes rows[j][i].
template <typename V, int N>
inline void transpose(V (&rows)[N]) {
  transpose_stage<1>(rows);
}

template <int Step, typename V, int N>
inline void sum_stage(V (&rows)[N]) {
  if constexpr (Step < N) {
    using All = std::make_index_sequence<N>;
    for (int i = 0; i < N; i += 2 * Step) {
      rows[i] =
          blocks<Step, false>(rows[i], rows[i + Step], All{}) + blocks<Step, true>(rows[i], rows[i + Step], All{});
    }
    sum_stage<2 * Step>(rows);
  }
}

// The sums over the lanes of each row: lane i of the result belongs to rows[i]. Overwrites the rows.
template <typename V, int N>
inline V sum_lanes(V (&rows)[N]) {
  sum_stage<1>(rows);
  return rows[0];
}

}  // namespace MDNET_NAMESPACE
