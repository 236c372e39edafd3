// The C interface of matrix products in bfloat16 (operator mdnet::BFloat16MatMul): inputs are float32 and are rounded,
// sums are float32.
//
// The only kernel is for AVX-512 BF16: without that instruction nothing is faster than the operators' function bodies.
#pragma once

#include "common/interface.h"

extern "C" {

// y[i] = a[i % a_matrices] b[i % b_matrices] for i < batch, each matrix contiguous and in row-major order.
// All sizes are at least 1.
struct MdnetMatmul {
  int64_t batch, rows, columns, inner;  // y: batch x rows x columns
  int64_t a_matrices, b_matrices;
  const float *a, *b;    // rows x inner and inner x columns, or transposed
  const void* a_packed;  // what mdnet_matmul_pack made of a, which is then not read; or null
  const void* b_packed;  // likewise
  float* y;
  int32_t a_transposed, b_transposed;
};

// Whether this processor has a kernel.
int mdnet_has_bfloat16(void);

int mdnet_matmul(const MdnetMatmul* call, MdnetParallelFor parallel_for, void* host);

// All matrices of a (or, if `b`, of b) as the kernel reads them, for the caller to free(). Null where memory ran out.
void* mdnet_matmul_pack(const MdnetMatmul* call, int b);
}
