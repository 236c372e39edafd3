// How kernels run: in which build, since CMake compiles each kernel's file once per instruction set, and on which
// threads.
#pragma once

#include "common/interface.h"

#ifdef MDNET_X86
#define MDNET_BUILDS(kernel) {nullptr, &mdnet_portable_##kernel, &mdnet_avx2_##kernel, &mdnet_avx512_##kernel}
#else
#define MDNET_BUILDS(kernel) {nullptr, &mdnet_portable_##kernel}
#endif

// The build for `isa`, an MdnetIsa; null where this processor has not its instructions.
template <typename Kernel, int n>
const Kernel* build_for(int isa, const Kernel* const (&builds)[n]) {
  if (isa == MDNET_BEST) isa = mdnet_isa();
  return isa >= MDNET_PORTABLE && isa <= mdnet_isa() && isa < n ? builds[isa] : nullptr;
}

// An MdnetParallelFor: the calling thread.
inline void in_turn(void*, void (*task)(void*, size_t), void* argument, size_t count) {
  for (size_t i = 0; i < count; ++i) task(argument, i);
}
