// Group normalisation over some pixels of an image, a part of a residual sum, some rows of GEGLU. CMake compiles this
// file once per instruction set.
//
// Channels lie side by side: they are the lanes of a vector, and no step sums across lanes.
#include "common/arithmetic.h"
#include "quantised/bytes.h"
#include "quantised/kernel.h"
#include "simd/builds.h"

namespace MDNET_NAMESPACE {
namespace {

template <typename T>
const T* x_at(const MdnetGroupNorm& call, int64_t image, int64_t pixel) {
  return static_cast<const T*>(call.x) + (image * call.pixels + pixel) * call.channels;
}

// Sums of some pixels, before they are added to doubles: of integers that can't overflow, or of so few floats that
// hardly a bit is lost.
template <typename T>
struct Short;
template <>
struct Short<uint8_t> {
  using Sum = uint32_t;
  static constexpr int64_t kPixels = 65536;  // times 255 * 255 is less than 2^32
};
template <>
struct Short<float> {
  using Sum = float;
  static constexpr int64_t kPixels = 32;
};

template <typename T>
void accumulate(const MdnetGroupNorm& call, const PixelRange& pixels, double* sums, double* squares) {
  using Sum = typename Short<T>::Sum;
  constexpr int64_t kChannels = 256;
  for (int64_t c = 0; c < call.channels; ++c) sums[c] = squares[c] = 0;
  for (int64_t first = 0; first < call.channels; first += kChannels) {
    const int64_t width = smaller(call.channels - first, kChannels);
    const T* origin = x_at<T>(call, pixels.image, 0) + first;
    const T* x = x_at<T>(call, pixels.image, pixels.first) + first;
    for (int64_t done = 0; done < pixels.count; done += Short<T>::kPixels) {
      Sum sum[kChannels] = {}, square[kChannels] = {};
      for (int64_t i = smaller(pixels.count - done, Short<T>::kPixels); i > 0; --i, x += call.channels) {
        for (int64_t c = 0; c < width; ++c) {
          Sum value = x[c];
          if constexpr (sizeof(T) == sizeof(float)) value -= origin[c];
          sum[c] += value;
          square[c] += value * value;
        }
      }
      for (int64_t c = 0; c < width; ++c) {
        sums[first + c] += sum[c];
        squares[first + c] += square[c];
      }
    }
  }
}

template <bool Silu, typename T>
void normalise(const MdnetGroupNorm& call, const PixelRange& pixels, const Normalisation& normalisation) {
  const float *mean = normalisation.mean, *scale = normalisation.scale, *offset = normalisation.offset;
  const Quantise quantise(call.y_scale, call.y_zero_point);
  const auto run = [&](const T* x, int64_t c, uint8_t* y) {
    Floats v = (widened(x) - load<Floats>(mean + c)) * load<Floats>(scale + c) + load<Floats>(offset + c);
    if constexpr (Silu) v = silu<float>(v);
    quantise(y, v);
  };
  const T* x = x_at<T>(call, pixels.image, pixels.first);
  uint8_t* y = call.y + (pixels.image * call.pixels + pixels.first) * call.channels;
  for (int64_t i = 0; i < pixels.count; ++i, x += call.channels, y += call.channels) {
    int64_t c = 0;
    for (; c + W <= call.channels; c += W) run(x + c, c, y + c);
    if (c == call.channels) continue;
    T last[W] = {};
    uint8_t result[W];
    memcpy(last, x + c, size_t(call.channels - c) * sizeof(T));
    run(last, c, result);
    memcpy(y + c, result, size_t(call.channels - c));
  }
}

template <typename A, typename Y>
void residual_sum(const MdnetResidualSum& call, int64_t first, int64_t end) {
  const Dequantise read_a(call.a_scale, call.a_zero_point), read_b(call.b_scale, call.b_zero_point);
  const Quantise quantise(call.y_scale, call.y_zero_point);
  const auto run = [&](const A* a, const uint8_t* b, Y* y) {
    const Floats value = read_a(a) + read_b(b);
    if constexpr (sizeof(Y) == 1) {
      quantise(y, value);
    } else {
      store(y, value);
    }
  };
  const A* a = static_cast<const A*>(call.a);
  Y* y = static_cast<Y*>(call.y);
  int64_t i = first;
  for (; i + W <= end; i += W) run(a + i, call.b + i, y + i);
  if (i == end) return;
  A last_a[W] = {};
  uint8_t last_b[W] = {};
  Y result[W];
  memcpy(last_a, a + i, size_t(end - i) * sizeof(A));
  memcpy(last_b, call.b + i, size_t(end - i));
  run(last_a, last_b, result);
  memcpy(y + i, result, size_t(end - i) * sizeof(Y));
}

void residual_sum_any(const MdnetResidualSum& call, int64_t first, int64_t end) {
  const auto chosen = call.a_is_uint8
                          ? (call.y_is_uint8 ? residual_sum<uint8_t, uint8_t> : residual_sum<uint8_t, float>)
                          : (call.y_is_uint8 ? residual_sum<float, uint8_t> : residual_sum<float, float>);
  chosen(call, first, end);
}

// x * Phi(x), of which erf's approximation 7.1.26 in Abramowitz and Stegun (1964) has an error of 1.5e-7.
inline Floats gelu(Floats x) {
  const Floats distance = at_least(x, -x) * 0.70710678f;
  const Floats t = reciprocal<float>(distance * 0.3275911f + 1.0f);
  Floats p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Floats tail = p * t * exp_of<float>(-distance * distance) * 0.5f;  // Phi(-|x|)
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

void geglu(const MdnetGeglu& call, int64_t first, int64_t end) {
  const Quantise quantise(call.y_scale, call.y_zero_point);
  const Dequantise read_x(call.x_scale, call.x_zero_point);
  const auto run = [&](const uint8_t* h, const uint8_t* g, const float* h_bias, const float* g_bias, uint8_t* y) {
    quantise(y, (read_x(h) + load<Floats>(h_bias)) * gelu(read_x(g) + load<Floats>(g_bias)));
  };
  const int64_t n = call.channels;
  for (int64_t row = first; row < end; ++row) {
    const uint8_t *h = call.x + row * 2 * n, *g = h + n;
    uint8_t* y = call.y + row * n;
    int64_t c = 0;
    for (; c + W <= n; c += W) run(h + c, g + c, call.bias + c, call.bias + n + c, y + c);
    if (c == n) continue;
    const size_t left = size_t(n - c);
    uint8_t last_h[W] = {}, last_g[W] = {}, result[W];
    float h_bias[W] = {}, g_bias[W] = {};
    memcpy(last_h, h + c, left);
    memcpy(last_g, g + c, left);
    memcpy(h_bias, call.bias + c, left * sizeof(float));
    memcpy(g_bias, call.bias + n + c, left * sizeof(float));
    run(last_h, last_g, h_bias, g_bias, result);
    memcpy(y + c, result, left);
  }
}

void accumulate_any(const MdnetGroupNorm& call, const PixelRange& pixels, double* sums, double* squares) {
  (call.x_is_uint8 ? accumulate<uint8_t> : accumulate<float>)(call, pixels, sums, squares);
}

void normalise_any(const MdnetGroupNorm& call, const PixelRange& pixels, const Normalisation& normalisation) {
  const auto chosen = call.x_is_uint8 ? (call.silu ? normalise<true, uint8_t> : normalise<false, uint8_t>)
                                      : (call.silu ? normalise<true, float> : normalise<false, float>);
  chosen(call, pixels, normalisation);
}

}  // namespace
}  // namespace MDNET_NAMESPACE

extern const QuantisedKernel MDNET_THIS_BUILD(quantised) = {MDNET_NAMESPACE::accumulate_any,
                                                            MDNET_NAMESPACE::normalise_any,
                                                            MDNET_NAMESPACE::residual_sum_any, MDNET_NAMESPACE::geglu};
