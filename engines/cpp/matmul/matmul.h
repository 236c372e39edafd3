// The C interface of float matrix products in bfloat16: inputs are rounded to it, sums are kept in float32.
//
// See mdnet_engines/product_op.py for the operators. Only processors with AVX-512 BF16 have a kernel for it; on others
// the operators' function body is as fast as anything.
#pragma once

#include "common/interface.h"

extern "C" {

// y[i] = a[i % a_matrices] b[i % b_matrices] for i < batch, each matrix contiguous and in row-major order.
// All sizes are at least 1.
struct MdnetMatmul {
  int64_t batch, rows, columns, inner;  // y: batch x rows x columns
  int64_t a_matrices, b_matrices;
  const float *a, *b;    // rows x inner and inner x columns, or transposed
  const void* a_packed;  // what mdnet_matmul_pack made of a, which is not read then; or null
  const void* b_packed;
  float* y;
  int32_t a_transposed, b_transposed;
};

// Whether this processor has a kernel.
int mdnet_has_bfloat16(void);

int mdnet_matmul(const MdnetMatmul* call, MdnetParallelFor parallel_for, void* host);

// All matrices of a (or of b) as the kernel reads them, to be freed by the caller; null where memory ran out.
void* mdnet_matmul_pack(const MdnetMatmul* call, int b);
}
