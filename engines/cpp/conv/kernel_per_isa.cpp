// One row of a depthwise convolution with SiLU; a few pixels of an image convolution. CMake compiles this file once per
// instruction set.
#include "conv/kernel.h"
#include "simd/builds.h"
#include "simd/math.h"

namespace MDNET_NAMESPACE {
namespace {

constexpr int64_t W = kWidth<float>;
using Floats = Vector<float>;

// W steps of x from `first` on; 0 outside of x.
inline Floats steps(const float* x, int64_t length, int64_t first) {
  if (first >= 0 && first + W <= length) return load<Floats>(x + first);
  Floats value{};
  for (int64_t i = first < 0 ? -first : 0; i < W && first + i < length; ++i) value[i] = x[first + i];
  return value;
}

void depthwise_silu(const MdnetDepthwiseConvSilu& call, int64_t row) {
  const int64_t channel = row % call.channels;
  const float *x = call.x + row * call.length, *w = call.w + channel * call.taps;
  float* y = call.y + row * call.length;
  for (int64_t t = 0; t < call.length; t += W) {
    Floats sum = splat(call.bias[channel]);
    for (int64_t k = 0; k < call.taps; ++k) sum += splat(w[k]) * steps(x, call.length, t - call.before + k);
    write<float>(y + t, silu<float>(sum), call.length - t);
  }
}

// Vectors of outputs in one pass: times kPixels, the sums just fit into the registers.
constexpr int kVectors = MDNET_VECTOR_BYTES == 64 ? 4 : 2;

void image(const float* inputs, int64_t lines, int64_t stride, int64_t taps, int64_t step, const float* weights,
           int64_t outputs, int64_t padded, float* y, int64_t count) {
  constexpr int kPixels = int(ConvKernel::kPixels);
  for (int64_t first = 0; first < outputs; first += kVectors * W) {
    const float* column = weights + first;
    Floats sums[kPixels][kVectors];
    for (int p = 0; p < kPixels; ++p) {
      for (int v = 0; v < kVectors; ++v) sums[p][v] = load<Floats>(column + lines * taps * padded + v * W);
    }
    for (int64_t line = 0; line < lines; ++line) {
      for (int64_t tap = 0; tap < taps; ++tap, column += padded) {
        const float* x = inputs + line * stride + tap;
        Floats weight[kVectors];
        for (int v = 0; v < kVectors; ++v) weight[v] = load<Floats>(column + v * W);
        for (int p = 0; p < kPixels; ++p) {
          const Floats value = splat(x[p * step]);
          for (int v = 0; v < kVectors; ++v) sums[p][v] += value * weight[v];
        }
      }
    }
    for (int p = 0; p < kPixels; ++p) {
      for (int v = 0; v < kVectors && p < count; ++v) {
        const int64_t output = first + v * W;
        if (output < outputs) write<float>(y + p * outputs + output, sums[p][v], outputs - output);
      }
    }
  }
}

}  // namespace
}  // namespace MDNET_NAMESPACE

extern const ConvKernel MDNET_THIS_BUILD(conv) = {MDNET_NAMESPACE::depthwise_silu, MDNET_NAMESPACE::image};
