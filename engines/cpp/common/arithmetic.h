// Arithmetic on sizes.
//
// Everything that kernels include has internal linkage: of an inline function with external linkage the linker keeps
// one copy, which could be that of a build for another processor.
#pragma once

#include <stdint.h>

namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

}  // namespace
