// What the processor and the system have of AVX. Not by __builtin_cpu_supports: Zig's runtime says no to everything.
#pragma once

#include <cpuid.h>

#include <atomic>

// kVnni: products of bytes that are added to 32 bits, in vectors of any width.
enum X86Feature : unsigned { kAvx2Fma = 1, kAvx512 = 2, kAvx512Bf16 = 4, kVnni = 8, kKnown = 16 };

inline unsigned read_x86_features() {
  unsigned a, b, c, d, more, unused, features = kKnown;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
  const bool fma = c & bit_FMA, saves_state = c & bit_OSXSAVE;
  if (!saves_state || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  if (!__get_cpuid_count(7, 1, &more, &unused, &unused, &unused)) more = 0;
  unsigned state, high;
  asm volatile("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
  constexpr unsigned kYmm = 0x06, kZmm = 0xe6;  // registers that the system saves
  if ((state & kYmm) != kYmm || !(b & bit_AVX2) || !fma) return features;
  features |= kAvx2Fma;
  constexpr unsigned kAvxVnni = 1 << 4, kAvx512Vnni = 1 << 11, kBf16 = 1 << 5;
  if (more & kAvxVnni) features |= kVnni;
  constexpr unsigned k512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512VL;
  if ((state & kZmm) != kZmm || (b & k512) != k512) return features;
  features |= kAvx512;
  if (c & kAvx512Vnni) features |= kVnni;
  const bool bytes_and_words = b & bit_AVX512BW;
  if (bytes_and_words && (more & kBf16)) features |= kAvx512Bf16;
  return features;
}

// Read once: on a virtual machine each question leaves it, which takes microseconds.
inline bool x86_has(X86Feature feature) {
  static std::atomic<unsigned> known{0};
  unsigned features = known.load(std::memory_order_relaxed);
  if (!features) known.store(features = read_x86_features(), std::memory_order_relaxed);
  return features & feature;
}
