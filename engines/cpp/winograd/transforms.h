// The transforms of Winograd's F(4 x 4, 3 x 3), for the points 0, +-1/sqrt(2), +-sqrt(2) and infinity, and the type in
// which each build multiplies.
#pragma once

#include <type_traits>

#include "common/arithmetic.h"
#include "quantised/bytes.h"
#include "winograd/kernel.h"

namespace MDNET_NAMESPACE {
namespace {

constexpr int kTile = int(WinogradKernel::kTile), kSize = 6, kPositions = int(WinogradKernel::kPositions);
constexpr int kTaps = int(WinogradKernel::kTaps);
constexpr int kVectors = 2;                               // registers side by side: of channels, or of outputs
constexpr int64_t kChannels = kVectors * W;               // transformed at a time
constexpr int64_t kStrip = kVectors * W;                  // outputs multiplied at a time
constexpr int64_t kColumns = 32;                          // outputs of a panel: one strip, or several
constexpr int kRows = MDNET_VECTOR_BYTES == 64 ? 12 : 6;  // tiles multiplied at a time: the sums fit into the registers
constexpr int64_t kTiles = MDNET_VECTOR_BYTES == 64 ? 32 : 48;  // of a block: all of them use a weight that was read
constexpr int64_t kLine = 64;                                   // bytes of a cache line

#ifdef MDNET_BFLOAT16
using Element = uint16_t;
using Factor = uint32_t;  // a pair of elements, which one instruction multiplies by a pair of the other side and adds
#else
using Element = float;
using Factor = float;
#endif
constexpr int64_t kPair = sizeof(Factor) / sizeof(Element);

constexpr float kNear = 0.70710678f, kFar = 1.41421356f;

inline Floats times_plus(float factor, Floats a, Floats b) { return multiply_add<float>(splat(factor), a, b); }

// Six values of x, in place.
inline void transform_input(Floats (&d)[kSize]) {
  const Floats first = times_plus(-2.5f, d[2], d[0] + d[4]), last = times_plus(-2.5f, d[3], d[1] + d[5]);
  const Floats even_near = times_plus(-2.0f, d[2], d[4]), odd_near = times_plus(-2.0f, d[1], d[3]);
  const Floats even_far = times_plus(-0.5f, d[2], d[4]), odd_far = times_plus(-0.5f, d[1], d[3]);
  d[0] = first;
  d[1] = times_plus(kNear, odd_near, even_near);
  d[2] = times_plus(-kNear, odd_near, even_near);
  d[3] = times_plus(kFar, odd_far, even_far);
  d[4] = times_plus(-kFar, odd_far, even_far);
  d[5] = last;
}

// Six sums to four values of y.
inline void transform_output(const Floats (&m)[kSize], Floats (&y)[kTile]) {
  const Floats even_near = m[1] + m[2], odd_near = m[1] - m[2], even_far = m[3] + m[4], odd_far = m[3] - m[4];
  y[0] = m[0] + even_near + even_far;
  y[1] = times_plus(kNear, odd_near, kFar * odd_far);
  y[2] = times_plus(0.5f, even_near, even_far + even_far);
  y[3] = times_plus(0.5f * kNear, odd_near, times_plus(2 * kFar, odd_far, m[5]));
}

// Three weights to six.
template <typename T>
inline void transform_weights(const T (&g)[3], T (&u)[kSize]) {
  using Scalar = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr double kRoot = 1.41421356237309504880;
  const T near = g[0] * Scalar(-2.0 / 3) + g[2] * Scalar(-1.0 / 3),
          far = g[0] * Scalar(1.0 / 6) + g[2] * Scalar(1.0 / 3);
  const T near_odd = g[1] * Scalar(kRoot / 3), far_odd = g[1] * Scalar(kRoot / 6);
  u[0] = g[0];
  u[1] = near - near_odd;
  u[2] = near + near_odd;
  u[3] = far + far_odd;
  u[4] = far - far_odd;
  u[5] = g[2];
}

// The transformed values of kChannels channels at one position of a tile.
inline void put(Element* to, const Floats (&values)[kVectors]) {
#ifdef MDNET_BFLOAT16
  store(to, _mm512_cvtne2ps_pbh(values[1], values[0]));
#else
  for (int v = 0; v < kVectors; ++v) store(to + v * W, values[v]);
#endif
}

}  // namespace
}  // namespace MDNET_NAMESPACE
