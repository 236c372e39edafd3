// exp, log1p, softplus, the sigmoid and SiLU on vectors.
//
// Relative errors in float32, for results above 1e-36 (tests/engines/ops/test_native.py holds them):
//   exp(x) 1.5e-7, softplus(x) 2.5e-7, silu(x) 3e-7, and 8e-8 |x| more where x is negative (x log2(e) is rounded).
// NaN gives NaN; exp(-inf) = 0, exp(inf) = inf, softplus(-inf) = 0, softplus(inf) = inf. Results below 1e-36 may be 0.
#pragma once

#include "simd/vector.h"

namespace MDNET_NAMESPACE {

// If `a` is NaN, both return it.
template <typename V>
inline V at_least(V a, V low) {
  return a < low ? low : a;
}
template <typename V>
inline V at_most(V a, V high) {
  return a > high ? high : a;
}
#if MDNET_VECTOR_BYTES == 64  // from the above, compilers make two instructions
inline Vector<float> at_least(Vector<float> a, Vector<float> low) { return _mm512_maskz_max_ps(0xffff, low, a); }
inline Vector<float> at_most(Vector<float> a, Vector<float> high) { return _mm512_maskz_min_ps(0xffff, high, a); }
#elif MDNET_VECTOR_BYTES == 32
inline Vector<float> at_least(Vector<float> a, Vector<float> low) { return _mm256_max_ps(low, a); }
inline Vector<float> at_most(Vector<float> a, Vector<float> high) { return _mm256_min_ps(high, a); }
#endif

// a b + c, rounded once where the processor can: the compiler's own choice may differ from one place to another.
template <typename T>
inline Vector<T> multiply_add(Vector<T> a, Vector<T> b, Vector<T> c) {
#if MDNET_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return Vector<T>(_mm512_fmadd_ps(a, b, c));
  if constexpr (sizeof(T) == 8) return Vector<T>(_mm512_fmadd_pd(a, b, c));
#elif MDNET_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return Vector<T>(_mm256_fmadd_ps(a, b, c));
  if constexpr (sizeof(T) == 8) return Vector<T>(_mm256_fmadd_pd(a, b, c));
#endif
  return a * b + c;
}

// 1 / a for a >= 1 (infinity and NaN included).
template <typename T>
inline Vector<T> reciprocal(Vector<T> a) {
#if MDNET_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {  // a quarter of a division's time; error 1.2e-7
    const __m512 x = _mm512_maskz_rcp14_ps(0xffff, a);
    const __m512 error = _mm512_fnmadd_ps(a, x, _mm512_set1_ps(1.0f));
    // Newton's step, but not at infinity, where x is right already and the step would compute inf * 0.
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

// 2^x for any x.
template <typename T>
inline Vector<T> exp2_of(Vector<T> x) {
  using R = Traits<T>;
#if MDNET_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {  // scalef saturates to 0 and inf by itself
    x = at_most(at_least(x, splat<T>(-300)), splat<T>(300));
    const Vector<T> k = (x + R::kMagic) - R::kMagic;
    return Vector<T>(_mm512_maskz_scalef_ps(0xffff, __m512(exp2_fraction(x - k)), __m512(k)));
  }
#endif
  // 2^k is assembled in the exponent's bits: 0 for the lowest k, inf for the highest.
  x = at_most(at_least(x, splat<T>(-R::kBias)), splat<T>(R::kBias + 1));
  const Vector<T> shifted = x + R::kMagic;
  const Vector<T> k = shifted - R::kMagic;
  Bits<T> bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + R::kBias) << R::kMantissa;
  Vector<T> power;
  memcpy(&power, &bits, sizeof power);
  return exp2_fraction(x - k) * power;
}

// 2^(a b) where |a b| < 2^21 in every lane, or, unless `Bounded`, anything. Where both may be used they agree to the
// bit.
template <bool Bounded, typename T>
inline Vector<T> exp2_product(Vector<T> a, Vector<T> b) {
#if MDNET_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const Vector<T> k = multiply_add<T>(a, b, splat(Traits<T>::kMagic)) - Traits<T>::kMagic;
    __m512 r = _mm512_fmsub_ps(a, b, k);
    // Beyond 2^21 r may be any number, or NaN where a b is infinite: then 1 will do, since k decides the result. Of r
    // and 1 this takes the one nearer to 0, and the number where one is NaN.
    constexpr int kSmallerMagnitude = 0b0010;
    if constexpr (!Bounded) r = _mm512_maskz_range_ps(0xffff, r, _mm512_set1_ps(1.0f), kSmallerMagnitude);
    return Vector<T>(_mm512_maskz_scalef_ps(0xffff, __m512(exp2_fraction(r)), __m512(k)));
  }
#endif
  return exp2_of<T>(a * b);
}

template <typename T>
inline Vector<T> exp_of(Vector<T> x) {
  return exp2_of<T>(x * T(1.44269504088896340736));
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
  // exp gets -|x|; a NaN passes through both terms.
  return at_least(x, Vector<T>{}) + log1p_of<T>(exp_of<T>(at_most(x, -x)));
}

// The derivative of softplus, the sigmoid, by the exponential that softplus takes: beside it, compilers make only one.
template <typename T>
inline Vector<T> softplus_slope(Vector<T> x) {
  const Vector<T> e = exp_of<T>(at_most(x, -x)), part = reciprocal<T>(T(1) + e);
  return x < T(0) ? e * part : part;
}

template <typename T>
inline Vector<T> sigmoid(Vector<T> x) {
  return reciprocal<T>(T(1) + exp_of<T>(-x));
}

template <typename T>
inline Vector<T> silu(Vector<T> x) {
  return x * sigmoid<T>(x);
}

}  // namespace MDNET_NAMESPACE
