// CUDA C++ as plain C++17: what a kernel needs to be compiled and run, thread by thread, on a CPU.
//
//   g++ -std=c++17 -x c++ -include cuda_on_cpu.h -c kernel.cu
//
// Every CUDA thread is a fiber with a stack of its own, so that barriers and shuffles really wait (`launch.cpp` resumes
// them). Shared memory is a section of the program, which the launcher fills with NaN before each block. The kernel
// must declare it in the kernel itself: compilers ignore the section inside of templates.
#pragma once

#include <math.h>
#include <string.h>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))
#define __syncthreads() cuda_on_cpu::synchronize(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) cuda_on_cpu::shuffle_xor(mask, value, lanes, __LINE__)

namespace cuda_on_cpu {

struct Index {
  unsigned x, y, z;
};

void synchronize(int line);
float shuffle_xor(unsigned mask, float value, int lanes, int line);

}  // namespace cuda_on_cpu

extern cuda_on_cpu::Index threadIdx, blockIdx;  // of the fiber that runs

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The PTX instructions that selective_scan.cu wraps. `ftz`: what is subnormal is zero.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline float ex2(float x) { return flushed(exp2f(flushed(x))); }
inline float rcp(float x) { return flushed(1.0f / flushed(x)); }

inline float half_to_float(unsigned short bits) {
  const unsigned sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  return copysignf(__uint_as_float(rest << 13) * 0x1p112f, __uint_as_float(sign));  // exact, subnormal or not
}

inline unsigned short float_to_half(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return 0x7fffu;          // NaN
  if (rest >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (rest < 0x38800000u)
    return sign | static_cast<unsigned>(rintf(fabsf(x) * 0x1p24f));       // subnormal, or becomes 2^-14
  return sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;  // to nearest, ties to even
}

inline unsigned short float_to_bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
