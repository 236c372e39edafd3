// What each build of kernel_per_isa.cpp offers to conv.cpp.
#pragma once

#include "conv/conv.h"

struct ConvKernel {
  static constexpr int64_t kPixels = 6;  // of y in one call of `image`

  void (*depthwise_silu)(const MdnetDepthwiseConvSilu& call, int64_t row);
  // All outputs of kPixels neighbouring pixels, of which the first `count` are stored. A pixel reads `taps` inputs from
  // each of `lines` lines, which are `stride` apart; the inputs of the next pixel begin `step` further on. `weights`
  // holds `padded` values for each tap, one for each output, and after the last tap the biases.
  void (*image)(const float* inputs, int64_t lines, int64_t stride, int64_t taps, int64_t step, const float* weights,
                int64_t outputs, int64_t padded, float* y, int64_t count);
};
