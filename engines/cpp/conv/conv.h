// The C interface of two convolutions in float32: depthwise along a sequence, with SiLU behind it; and of an image with
// few channels. See mdnet_engines/conv_op.py.
#pragma once

#include "common/interface.h"

#ifdef __cplusplus
extern "C" {
#endif

// y[t] = silu(bias + sum of w[k] x[t - before + k] over the taps k), for each row; x is 0 outside of its row.
typedef struct {
  int64_t rows, channels, length, taps;  // each at least 1; a row's channel is row % channels
  int64_t before;                        // taps that lie before the step itself: from 0 to taps - 1
  const float *x, *w, *bias;             // rows x length; channels x taps; channels
  float* y;                              // rows x length
  int32_t isa;                           // MdnetIsa
} MdnetConvSilu;

// y[p] = bias + sum of w[., tap] x[p + tap - pad] over places and channels; x is 0 outside of the image.
typedef struct {
  int64_t batch, height, width, channels;        // x, channels last; each at least 1
  int64_t outputs, kernel_height, kernel_width;  // at least 1
  int64_t pad;                                   // on each side
  const float *x, *w, *bias;  // batch x height x width x channels; outputs x channels x kernel; outputs
  float* y;                   // batch x (height + 2 pad - kernel_height + 1) x (the same of width) x outputs
  int32_t isa;                // MdnetIsa
} MdnetImageConv;

int mdnet_image_conv(const MdnetImageConv* call, MdnetParallelFor parallel_for, void* host);
int mdnet_conv_silu(const MdnetConvSilu* call, MdnetParallelFor parallel_for, void* host);

// The same on the calling thread.
int mdnet_conv_silu_here(const MdnetConvSilu* call);
int mdnet_image_conv_here(const MdnetImageConv* call);

#ifdef __cplusplus
}

struct MdnetConvKernel {
  static constexpr int64_t kPlaces = 6;  // of y that are made at a time

  void (*row)(const MdnetConvSilu& call, int64_t row);
  // The outputs of kPlaces places that lie side by side, of which `count` are stored. Each takes `taps` inputs of each
  // of `lines`, which are `stride` apart; the next place's begin `step` further on. `weights` has for each tap all
  // outputs, padded to `padded`, and the biases behind the last tap.
  void (*places)(const float* inputs, int64_t lines, int64_t stride, int64_t taps, int64_t step, const float* weights,
                 int64_t outputs, int64_t padded, float* y, int64_t count);
};

extern const MdnetConvKernel mdnet_portable_conv;
extern const MdnetConvKernel mdnet_avx2_conv;
extern const MdnetConvKernel mdnet_avx512_conv;
#endif
