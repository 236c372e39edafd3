// The kernel of matrix products in bfloat16, and the layout of the operands that are packed for it.
//
// As in other libraries for matrix products, y is made in tiles whose sums stay in registers, and operands are packed
// into panels as wide as a tile. A value of a panel is a pair of bfloat16 along the inner axis, the first in the low
// half; an odd end is filled with 0.
//   a: panels of kRows rows, row after row; missing rows are 0.
//   b: panels of kColumns columns, pair after pair; missing columns are 0, and the last panel has half the width where
//      that is enough.
#pragma once

#include "common/arithmetic.h"
#include "matmul/matmul.h"

struct MatmulKernel {
  static constexpr int64_t kRows = 12, kColumns = 32;  // of a tile
  static constexpr int64_t kPairs = 512;  // multiplied at a time, so that this part of a panel stays in the cache

  // Pack `count` pairs, from the pair `first` on, of a panel of a.
  void (*pack_a)(const MdnetMatmul& call, int64_t matrix, int64_t panel, int64_t first, int64_t count, uint32_t* to);
  // Pack a panel of b.
  void (*pack_b)(const MdnetMatmul& call, int64_t matrix, int64_t panel, uint32_t* to);
  // Set a tile of y to the products of some pairs, or `add` them to it; a and b point to the first pair.
  void (*multiply)(const MdnetMatmul& call, const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_panel,
                   int64_t pairs, bool add, int64_t image, int64_t a_panel);
  // exp(x - maximum of the row), packed as pack_a does, and for each row 1 / sum: the softmax before it is scaled.
  void (*softmax)(const float* x, int64_t rows, int64_t columns, uint32_t* pairs, float* inverse_sums);
  // Multiply each row by its factor, in place.
  void (*scale_rows)(float* y, int64_t rows, int64_t columns, const float* factors);
};

// Null where this processor has no such kernel.
const MatmulKernel* matmul_kernel();

namespace {

constexpr int64_t kRows = MatmulKernel::kRows, kColumns = MatmulKernel::kColumns;

inline int64_t pairs(const MdnetMatmul& call) { return ceil_div(call.inner, 2); }
inline int64_t a_panels(const MdnetMatmul& call) { return ceil_div(call.rows, kRows); }
inline int64_t b_panels(const MdnetMatmul& call) { return ceil_div(call.columns, kColumns); }

// In pairs: the size of a packed matrix, and where a panel begins in it.
inline int64_t packed_a(const MdnetMatmul& call) { return a_panels(call) * kRows * pairs(call); }
inline int64_t packed_b(const MdnetMatmul& call) { return round_up(call.columns, kColumns / 2) * pairs(call); }
inline int64_t a_panel_start(const MdnetMatmul& call, int64_t panel) { return panel * kRows * pairs(call); }
inline int64_t b_panel_start(const MdnetMatmul& call, int64_t panel) { return panel * kColumns * pairs(call); }

// Pack one panel of b into `to`, which holds all matrices; `task` counts the panels of all of them.
inline void pack_b_panel(const MatmulKernel& kernel, const MdnetMatmul& call, int64_t task, uint32_t* to) {
  const int64_t matrix = task / b_panels(call), panel = task % b_panels(call);
  kernel.pack_b(call, matrix, panel, to + matrix * packed_b(call) + b_panel_start(call, panel));
}

}  // namespace
