// float16 and bfloat16. Kernels convert values where they read and write them, and compute in float.
#pragma once

#include <stdint.h>
#include <string.h>

namespace MDNET_NAMESPACE {

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

}  // namespace MDNET_NAMESPACE
