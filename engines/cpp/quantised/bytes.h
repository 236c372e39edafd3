// Vectors of floats that lie in memory as such, or quantised to bytes.
#pragma once

#include "simd/math.h"

namespace MDNET_NAMESPACE {
namespace {

constexpr int W = kWidth<float>;
using Floats = Vector<float>;
typedef uint8_t Bytes __attribute__((vector_size(W)));

// W values from memory. By intrinsics, since GCC 12 would convert bytes one lane at a time.
inline Floats widened(const float* from) { return load<Floats>(from); }
inline Floats widened(const uint8_t* from) {
#if MDNET_VECTOR_BYTES == 64
  const __m512i values = _mm512_maskz_cvtepu8_epi32(0xffff, load<__m128i>(from));
  return __builtin_convertvector(Bits<float>(values), Floats);
#elif MDNET_VECTOR_BYTES == 32
  const __m256i values = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return __builtin_convertvector(Bits<float>(values), Floats);
#else
  return __builtin_convertvector(load<Bytes>(from), Floats);
#endif
}

// Stores W integers from 0 to 255 as bytes.
inline void store_bytes(uint8_t* to, Bits<float> values) {
#if MDNET_VECTOR_BYTES == 32
  const __m256i all = __m256i(values);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  store(to, __builtin_convertvector(values, Bytes));
#endif
}

// Floats to bytes.
class Quantise {
 public:
  Quantise(float scale, int32_t zero_point)
      : per_unit_(splat(1.0f / scale)),
        lowest_(splat(float(-zero_point))),
        highest_(splat(float(255 - zero_point))),
        zero_point_(Bits<float>{} + (zero_point - int32_t(as_bits(Traits<float>::kMagic)))) {}

  void operator()(uint8_t* to, Floats v) const {
    // The addition rounds half to even, and leaves the integer in the low bits.
    v = at_most(at_least(v * per_unit_, lowest_), highest_) + Traits<float>::kMagic;
    Bits<float> bits;
    memcpy(&bits, &v, sizeof bits);
    store_bytes(to, bits + zero_point_);
  }

 private:
  Floats per_unit_, lowest_, highest_;
  Bits<float> zero_point_;
};

// Bytes to floats; floats stay as they are.
class Dequantise {
 public:
  Dequantise(float scale, int32_t zero_point) : scale_(splat(scale)), zero_point_(splat(float(zero_point))) {}
  Floats operator()(const uint8_t* from) const { return (widened(from) - zero_point_) * scale_; }
  Floats operator()(const float* from) const { return load<Floats>(from); }

 private:
  Floats scale_, zero_point_;
};

}  // namespace
}  // namespace MDNET_NAMESPACE
