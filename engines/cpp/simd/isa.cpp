// The instruction sets that kernels are built for and this processor has.
#include "common/interface.h"

extern "C" int mdnet_isa(void) {
#ifdef MDNET_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return MDNET_AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return MDNET_AVX2;
#endif
  return MDNET_PORTABLE;
}
