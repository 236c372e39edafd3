// Arithmetic on sizes. In an unnamed namespace, as everything that several builds of a kernel include: a shared inline
// function could be linked in from a build for another processor.
#pragma once

#include <stdint.h>

namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

}  // namespace
