// The C interface of attention with products in bfloat16. See mdnet_engines/product_op.py.
#pragma once

#include "common/interface.h"

extern "C" {

// y[i] = softmax(q k) v of the matrices i % their number, each contiguous and in row-major order.
// All sizes are at least 1.
struct MdnetAttention {
  int64_t batch, rows, keys, inner, columns;  // q: rows x inner   k: inner x keys   v: keys x columns
  int64_t q_matrices, k_matrices, v_matrices;
  const float *q, *k, *v;
  const void *k_packed, *v_packed;  // what mdnet_matmul_pack made of k and v as b; or null
  float* y;                         // batch x rows x columns
};

int mdnet_attention(const MdnetAttention* call, MdnetParallelFor parallel_for, void* host);
}
