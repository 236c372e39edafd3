// The C interface of float products in bfloat16: inputs are rounded to it, sums are kept in float32.
//
// See mdnet_engines/quantised_ops.py for the operators. Only processors with AVX-512 BF16 have a kernel for it; on
// others the operators' function body is as fast as anything.
#pragma once

#include "common/interface.h"

#ifdef __cplusplus
extern "C" {
#endif

// y[i] = a[i % a_matrices] b[i % b_matrices] for i < batch, each matrix contiguous and in row-major order.
// All sizes are at least 1.
typedef struct {
  int64_t batch, rows, columns, inner;  // y: batch x rows x columns
  int64_t a_matrices, b_matrices;
  const float *a, *b;    // rows x inner and inner x columns, or transposed
  const void* a_packed;  // what mdnet_product_pack made of a, which is not read then; or null
  const void* b_packed;
  float* y;
  int32_t a_transposed, b_transposed;
} MdnetProduct;

// Whether this processor has a kernel.
int mdnet_has_bfloat16(void);

int mdnet_product(const MdnetProduct* call, MdnetParallelFor parallel_for, void* host);

// All matrices of a (or of b) as the kernel reads them, to be freed by the caller; null where memory ran out.
void* mdnet_product_pack(const MdnetProduct* call, int b);

// The same on the calling thread.
int mdnet_product_here(const MdnetProduct* call);

#ifdef __cplusplus
}

// Inputs are stored in pairs of bfloat16 along the inner axis, the first in the low half; an odd end is filled with 0.
// a: groups of kRows rows, each row's pairs side by side; missing rows are 0.
// b: panels of kColumns columns, for each pair its columns side by side; the last panel has half the width where that
// is enough, and missing columns are 0.
struct MdnetProductKernel {
  static constexpr int64_t kRows = 12, kColumns = 32;
  static constexpr int64_t kPairs = 512;  // that are multiplied at a time, so that a group of rows stays in the cache

  // Pack `count` pairs, from the pair `first` on, of a group of a's rows.
  void (*pack_rows)(const MdnetProduct& call, int64_t matrix, int64_t group, int64_t first, int64_t count,
                    uint32_t* to);
  void (*pack_panel)(const MdnetProduct& call, int64_t matrix, int64_t panel, uint32_t* to);
  // Add the products of some pairs to a group of y's rows, or set them; a and b begin at the first pair.
  void (*multiply)(const MdnetProduct& call, const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t panel,
                   int64_t pairs, bool add, int64_t image, int64_t group);
  // exp(x - the highest of its row), in pairs as pack_rows gives them; and for each row 1 / its sum.
  void (*softmax)(const float* x, int64_t rows, int64_t columns, uint32_t* pairs, float* shares);
  // Multiply each row by its factor, in place.
  void (*scale)(float* y, int64_t rows, int64_t columns, const float* factors);
};

extern const MdnetProductKernel mdnet_bfloat16_product;
#endif
