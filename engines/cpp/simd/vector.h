// Vectors of one register's width, in the vector extensions that GCC (12 and newer) and Clang share: the compiler picks
// the instructions.
//
// Kernels include this once per instruction set. All names are in the build's own namespace, so that the linker can't
// take an inline function of one build for that of another. CMakeLists.txt sets MDNET_NAMESPACE and MDNET_VECTOR_BYTES.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "simd/half.h"

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
  return value - Vector<T>{};  // not {} + value, which would turn -0 into 0: that costs an instruction
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

// The first `count` elements (kWidth at most), followed by zeros.
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

}  // namespace MDNET_NAMESPACE
