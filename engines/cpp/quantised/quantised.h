// The C interface of what runs between two quantised layers: group normalisation, the residual sum, GEGLU. The function
// bodies of the operators (QLinearGroupNorm and the others of onnxruntime/quantised.cpp) have the formulas.
#pragma once

#include "common/interface.h"

extern "C" {

// y = group normalisation of x, then SiLU if `silu`, quantised to uint8_t.
struct MdnetGroupNorm {
  int64_t batch, pixels, channels;  // x and y: batch x pixels x channels, contiguous; each at least 1
  int64_t groups;                   // a divisor of channels
  const void* x;                    // uint8_t or float
  const float *gamma, *beta;        // channels
  uint8_t* y;
  float x_scale, y_scale, epsilon;
  int32_t y_zero_point;  // the zero-point of x cancels out
  int32_t x_is_uint8;
  int32_t silu;
  int32_t isa;  // MdnetIsa
};

// What group normalisation makes of x is x * scale + offset, with one pair for each channel of an image.
struct MdnetGroupNormScale {
  int64_t batch, pixels, channels;  // of x, contiguous; each at least 1
  int64_t groups;                   // a divisor of channels
  const float *x, *gamma, *beta;    // gamma, beta: channels
  float *scale, *offset;            // batch x channels
  float epsilon;
  int32_t isa;  // MdnetIsa
};

// y = a + b. A uint8_t stands for (value - zero_point) * scale.
struct MdnetResidualSum {
  int64_t count;  // of elements, at least 1
  const void* a;  // float, or uint8_t
  const uint8_t* b;
  void* y;                          // float, or uint8_t
  float a_scale, b_scale, y_scale;  // of those that are uint8_t
  int32_t a_zero_point, b_zero_point, y_zero_point;
  int32_t a_is_uint8, y_is_uint8;
  int32_t isa;  // MdnetIsa
};

// y = h * gelu(g), quantised, where h and g are the halves of each row of (x - x_zero_point) * x_scale + bias.
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
int mdnet_group_norm_scale(const MdnetGroupNormScale* call, MdnetParallelFor parallel_for, void* host);
int mdnet_residual_sum(const MdnetResidualSum* call, MdnetParallelFor parallel_for, void* host);
int mdnet_geglu(const MdnetGeglu* call, MdnetParallelFor parallel_for, void* host);
}
