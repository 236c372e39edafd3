// The C interface of what runs natively between two quantised layers: group normalisation, the residual sum, GEGLU.
//
// See mdnet_engines/quantised_ops.py for the formulas and the operators.
#pragma once

#include "common/interface.h"

extern "C" {

// Group normalisation to uint8_t, with SiLU behind it where `silu` says so.
struct MdnetGroupNorm {
  int64_t batch, pixels, channels;  // x and y: batch x pixels x channels, contiguous; each at least 1
  int64_t groups;                   // a divisor of channels
  const void* x;                    // uint8_t or float
  const float *gamma, *beta;        // channels
  uint8_t* y;
  float x_scale, y_scale, epsilon;
  int32_t y_zero_point;  // that of x cancels out
  int32_t x_is_uint8;
  int32_t silu;
  int32_t isa;  // MdnetIsa
};

// y = a + b, where bytes are read as (byte - zero_point) * scale, and y is rounded to bytes if those are wanted.
struct MdnetResidualSum {
  int64_t count;  // of elements, at least 1
  const void* a;  // float, or uint8_t
  const uint8_t* b;
  void* y;                          // float, or uint8_t
  float a_scale, b_scale, y_scale;  // of bytes
  int32_t a_zero_point, b_zero_point, y_zero_point;
  int32_t a_is_uint8, y_is_uint8;
  int32_t isa;  // MdnetIsa
};

// y = h * gelu(g), rounded to bytes, where h and g are the halves of each row of (x - x_zero_point) * x_scale + bias.
struct MdnetGeglu {
  int64_t rows, channels;  // x: rows x 2 channels, y: rows x channels; each at least 1
  const uint8_t* x;
  const float* bias;  // 2 channels
  uint8_t* y;
  float x_scale, y_scale;
  int32_t x_zero_point, y_zero_point;
  int32_t isa;  // MdnetIsa
};

int mdnet_group_norm(const MdnetGroupNorm* call, MdnetParallelFor parallel_for, void* host);
int mdnet_residual_sum(const MdnetResidualSum* call, MdnetParallelFor parallel_for, void* host);
int mdnet_geglu(const MdnetGeglu* call, MdnetParallelFor parallel_for, void* host);
}
