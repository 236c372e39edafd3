// Which build of a kernel runs: CMake compiles each kernel_per_isa.cpp once per instruction set, and each build has a
// table of its functions.
#pragma once

#include "common/interface.h"

// The name of the table, in kernel_per_isa.cpp.
#define MDNET_JOIN_(a, b) a##b
#define MDNET_JOIN(a, b) MDNET_JOIN_(a, b)
#define MDNET_THIS_BUILD(kernel) MDNET_JOIN(MDNET_NAMESPACE, _##kernel)

// Declares the tables of all builds, by MdnetIsa, in a file that calls the kernel.
#ifdef MDNET_X86
#define MDNET_BUILDS(Kernel, kernel)                                                                    \
  extern const Kernel mdnet_portable_##kernel, mdnet_avx2_##kernel, mdnet_avx512_##kernel;              \
  constexpr const Kernel* kernel##_builds[] = {nullptr, &mdnet_portable_##kernel, &mdnet_avx2_##kernel, \
                                               &mdnet_avx512_##kernel}
#else
#define MDNET_BUILDS(Kernel, kernel)           \
  extern const Kernel mdnet_portable_##kernel; \
  constexpr const Kernel* kernel##_builds[] = {nullptr, &mdnet_portable_##kernel}
#endif

// The build for `isa`, an MdnetIsa; null where this processor does not have its instructions.
template <typename Kernel, int n>
const Kernel* build_for(int isa, const Kernel* const (&builds)[n]) {
  if (isa == MDNET_BEST) isa = mdnet_isa();
  return isa >= MDNET_PORTABLE && isa <= mdnet_isa() && isa < n ? builds[isa] : nullptr;
}
