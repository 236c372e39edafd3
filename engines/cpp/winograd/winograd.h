// The C interface of 3 x 3 convolutions, stride 1, zero padding 1, channels last, by Winograd's algorithm: F(4 x 4,
// 3 x 3) has a quarter of a direct convolution's multiplications.
//
// A tile of 4 x 4 places of y is made from 6 x 6 places of x. Both and the weights are transformed by the points 0,
// +-1/sqrt(2), +-sqrt(2) and infinity, whose error is less than half of that by the usual 0, +-1, +-2 and infinity.
// An infinity or NaN in x may make NaN of the whole tiles that read it.
//
// Errors, root mean square relative to y's (tests/engines/ops/test_winograd.py holds them): float32 2.6e-6 at 512
// channels, bfloat16 1.3e-2. At most, where products round their operands by u (2^-24, 2^-8) and sums are exact:
// 2 u 620 channels max|x| max|w|, since the transforms' row sums, multiplied out, are 24.9 in each direction.
#pragma once

#include "common/interface.h"

extern "C" {

// In what the transformed values are multiplied; everything else, sums included, is float32.
enum MdnetWinogradProducts { MDNET_WINOGRAD_FLOAT32 = 0, MDNET_WINOGRAD_BFLOAT16 = 1 };

// Weights as a kernel reads them; the layout is that of one build.
struct MdnetWinogradWeights;

// w: outputs x channels x 3 x 3. They are transformed here, once: four times as many values. The result is for the
// caller to free(). Null where a size is below 1, where memory ran out, or where this processor lacks the instruction
// set or products in bfloat16 (which `isa` MDNET_AVX512 and MDNET_BEST have, where mdnet_has_bfloat16()).
MdnetWinogradWeights* mdnet_winograd_pack(const float* w, int64_t channels, int64_t outputs, int32_t products,
                                          int32_t isa);

// The same for weights w * scale[output], which stay bytes: each call transforms them anew for every block of tiles.
// Calls are slower; weights take an eighth of the memory (bfloat16) or a sixteenth (float32).
MdnetWinogradWeights* mdnet_winograd_pack_bytes(const int8_t* w, const float* scale, int64_t channels, int64_t outputs,
                                                int32_t products, int32_t isa);

// y = convolution of f(x), + bias, + residual; f(x) = x, or x * scale + offset, or SiLU of that. Outside of the image
// f(x) is 0. A uint8_t stands for (value - zero_point) * scale.
struct MdnetWinograd {
  int64_t batch, height, width;  // each at least 1; channels and outputs are those of the weights
  const void* x;                 // batch x height x width x channels, float or uint8_t
  const float *scale, *offset;   // batch x channels, for a float x; or both null
  const MdnetWinogradWeights* weights;
  const float* bias;       // outputs; or null
  const void* residual;    // of y's shape, float or uint8_t; or null
  void* y;                 // batch x height x width x outputs, float or uint8_t; not the same memory as x
  float x_scale, y_scale;  // of what is uint8_t
  int32_t x_zero_point, y_zero_point;
  int32_t x_is_uint8, y_is_uint8;
  int32_t silu;  // of f; only with scale and offset
  float residual_scale;
  int32_t residual_zero_point, residual_is_uint8;
};

// The MdnetWinogradProducts that are faster on this processor than a direct convolution of bytes, or -1: bfloat16 where
// it has them, float32 where it has AVX2 and no VNNI.
int mdnet_winograd_products(void);

// An image's result does not depend on the batch or the number of threads.
int mdnet_winograd(const MdnetWinograd* call, MdnetParallelFor parallel_for, void* host);
}
