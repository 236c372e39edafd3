// The C interface of attention with matrix products in bfloat16 (operator mdnet::BFloat16Attention).
#pragma once

#include "common/interface.h"

extern "C" {

// y[i] = softmax(q[i % q_matrices] k[i % k_matrices]) v[i % v_matrices] for i < batch, each matrix contiguous and in
// row-major order. All sizes are at least 1.
struct MdnetAttention {
  int64_t batch, rows, keys, inner, columns;  // q: rows x inner   k: inner x keys   v: keys x columns
  int64_t q_matrices, k_matrices, v_matrices;
  const float *q, *k, *v;
  const void *k_packed, *v_packed;  // k and v as mdnet_matmul_pack packs a b; or null
  float* y;                         // batch x rows x columns
};

int mdnet_attention(const MdnetAttention* call, MdnetParallelFor parallel_for, void* host);
}
