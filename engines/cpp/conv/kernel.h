// What each build of kernel_per_isa.cpp offers to conv.cpp.
#pragma once

#include "conv/conv.h"

struct ConvKernel {
  static constexpr int64_t kPixels = 6;  // of y that are made at a time

  void (*depthwise_silu)(const MdnetDepthwiseConvSilu& call, int64_t row);
  // The outputs of kPixels pixels that lie side by side, of which `count` are stored. Each takes `taps` inputs of each
  // of `lines`, which are `stride` apart; the next pixel's begin `step` further on. `weights` has for each tap all
  // outputs, padded to `padded`, and the biases behind the last tap.
  void (*image)(const float* inputs, int64_t lines, int64_t stride, int64_t taps, int64_t step, const float* weights,
                int64_t outputs, int64_t padded, float* y, int64_t count);
};
