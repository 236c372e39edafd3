// The instruction sets that kernels are built for and this processor has.
#include "common/interface.h"
#ifdef MDNET_X86
#include "simd/x86_features.h"
#endif

extern "C" int mdnet_isa(void) {
#ifdef MDNET_X86
  if (x86_has(kAvx512)) return MDNET_AVX512;
  if (x86_has(kAvx2Fma)) return MDNET_AVX2;
#endif
  return MDNET_PORTABLE;
}
