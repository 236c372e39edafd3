// The C interface of attention with products in bfloat16. See mdnet_engines/product_op.py.
#pragma once

#include "matmul/matmul.h"

#ifdef __cplusplus
extern "C" {
#endif

// y[i] = softmax(q k) v of the matrices i % their number, each contiguous and in row-major order.
// All sizes are at least 1.
typedef struct {
  int64_t batch, rows, keys, inner, columns;  // q: rows x inner   k: inner x keys   v: keys x columns
  int64_t q_matrices, k_matrices, v_matrices;
  const float *q, *k, *v;
  const void *k_packed, *v_packed;  // what mdnet_product_pack made of k and v as b; or null
  float* y;                         // batch x rows x columns
} MdnetAttention;

int mdnet_attention(const MdnetAttention* call, MdnetParallelFor parallel_for, void* host);

// The same on the calling thread.
int mdnet_attention_here(const MdnetAttention* call);

#ifdef __cplusplus
}
#endif
