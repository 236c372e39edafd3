// How the operands of a product lie in memory once they are packed: see MdnetProductKernel.
#pragma once

#include <stdlib.h>

#include "matmul/matmul.h"

namespace {

constexpr int64_t kRows = MdnetProductKernel::kRows, kColumns = MdnetProductKernel::kColumns;

inline int64_t ratio_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t pairs(const MdnetProduct& call) { return ratio_up(call.inner, 2); }
inline int64_t groups(const MdnetProduct& call) { return ratio_up(call.rows, kRows); }
inline int64_t panels(const MdnetProduct& call) { return ratio_up(call.columns, kColumns); }

// Pairs of a matrix.
inline int64_t packed_a(const MdnetProduct& call) { return groups(call) * kRows * pairs(call); }
inline int64_t packed_b(const MdnetProduct& call) {
  return ratio_up(call.columns, kColumns / 2) * (kColumns / 2) * pairs(call);
}

// The panel of all b's matrices that `task` counts, at its place in `to`.
inline void pack_panel(const MdnetProductKernel& kernel, const MdnetProduct& call, int64_t task, uint32_t* to) {
  const int64_t matrix = task / panels(call), panel = task % panels(call);
  kernel.pack_panel(call, matrix, panel, to + matrix * packed_b(call) + panel * kColumns * pairs(call));
}

inline uint32_t* allocate(int64_t count) {
  void* memory = nullptr;
  return posix_memalign(&memory, 64, size_t(count) * sizeof(uint32_t)) ? nullptr : static_cast<uint32_t*>(memory);
}

// Null where this processor has none.
inline const MdnetProductKernel* product_kernel() {
#ifdef MDNET_HAS_PRODUCT
  if (mdnet_has_bfloat16()) return &mdnet_bfloat16_product;
#endif
  return nullptr;
}

}  // namespace
