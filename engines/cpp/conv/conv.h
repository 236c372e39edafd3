// The C interface of two convolutions in float32: depthwise along a sequence, with SiLU behind it; and of an image with
// few channels (operators mdnet::DepthwiseConvSilu and mdnet::ImageConv).
#pragma once

#include "common/interface.h"

extern "C" {

// y[t] = silu(bias + sum of w[k] x[t - before + k] over the taps k), for each row; x is 0 outside of its row.
struct MdnetDepthwiseConvSilu {
  int64_t rows, channels, length, taps;  // each at least 1; a row's channel is row % channels
  int64_t before;                        // how many taps lie before the step itself: 0 to taps - 1
  const float *x, *w, *bias;             // rows x length; channels x taps; channels
  float* y;                              // rows x length
  int32_t isa;                           // MdnetIsa
};

// y[p] = bias + sum of w[., tap] x[p + tap - pad] over taps and channels; x is 0 outside of the image.
struct MdnetImageConv {
  int64_t batch, height, width, channels;        // x, channels last; each at least 1
  int64_t outputs, kernel_height, kernel_width;  // at least 1
  int64_t pad;                                   // on each side
  const float *x, *w, *bias;  // batch x height x width x channels; outputs x channels x kernel; outputs
  float* y;                   // batch x (height + 2 pad - kernel_height + 1) x (the same of width) x outputs
  int32_t isa;                // MdnetIsa
};

int mdnet_depthwise_conv_silu(const MdnetDepthwiseConvSilu* call, MdnetParallelFor parallel_for, void* host);
int mdnet_image_conv(const MdnetImageConv* call, MdnetParallelFor parallel_for, void* host);
}
