// Weights as the kernel multiplies them: transformed once, or kept as bytes and transformed a panel at a time.
#pragma once

#include "winograd/transforms.h"

namespace MDNET_NAMESPACE {
namespace {

// Where a weight lies in a strip: the row of its channel or pair, and the place in that row.
constexpr int64_t kRow = kStrip * kPair;
inline int64_t row_of(int64_t channel) { return channel / kPair; }
inline int64_t place_in_row(int64_t output, int64_t channel) { return output % kStrip * kPair + channel % kPair; }

void pack(const float* w, int64_t channels, int64_t outputs, void* panels) {
  const int64_t padded = round_up(channels, kChannels);
  Element* to = static_cast<Element*>(panels);
  for (int64_t o = 0; o < round_up(outputs, kColumns); ++o) {
    for (int64_t c = 0; c < padded; ++c) {
      double g[kTaps] = {};
      for (int i = 0; i < kTaps && o < outputs && c < channels; ++i) g[i] = double(w[(o * channels + c) * kTaps + i]);
      Element* place = to + o / kColumns * kPositions * padded * kColumns + o % kColumns / kStrip * padded * kStrip +
                       row_of(c) * kRow + place_in_row(o, c);
      double half[3][kSize];
      for (int i = 0; i < 3; ++i) transform_weights({g[3 * i], g[3 * i + 1], g[3 * i + 2]}, half[i]);
      for (int j = 0; j < kSize; ++j) {
        double column[kSize];
        transform_weights({half[0][j], half[1][j], half[2][j]}, column);
        for (int i = 0; i < kSize; ++i) {
          const float value = float(column[i]);
          Element* element = place + (i * kSize + j) * padded * kColumns;
#ifdef MDNET_BFLOAT16
          Bfloat rounded;
          narrow(value, &rounded);
          *element = rounded.bits;
#else
          *element = value;
#endif
        }
      }
    }
  }
}

void pack_bytes(const int8_t* w, int64_t channels, int64_t outputs, uint8_t* panels) {
  const int64_t padded = round_up(channels, kChannels);
  for (int64_t o = 0; o < round_up(outputs, kColumns); ++o) {
    for (int64_t c = 0; c < padded; ++c) {
      uint8_t* place = panels + (o / kStrip * padded / kPair + row_of(c)) * kTaps * kRow + place_in_row(o, c);
      for (int i = 0; i < kTaps; ++i) {
        const int value = o < outputs && c < channels ? w[(o * channels + c) * kTaps + i] : 0;
        place[i * kRow] = uint8_t(value + WinogradKernel::kZero);
      }
    }
  }
}

// A panel of weights that are bytes: as `pack` would make it.
void transform_panel(const uint8_t* bytes, int64_t padded, int64_t stride, Element* to) {
  for (int64_t strip = 0; strip < kColumns / kStrip; ++strip) {
    for (int64_t row = 0; row < padded / kPair; ++row, bytes += kTaps * kRow) {
      for (int64_t at = 0; at < kRow; at += kVectors * W, to += kVectors * W) {
        Floats half[kVectors][3][kSize];
        for (int v = 0; v < kVectors; ++v) {
          for (int i = 0; i < 3; ++i) {
            Floats g[3];
            for (int j = 0; j < 3; ++j) {
              g[j] = widened(bytes + (3 * i + j) * kRow + at + v * W) - splat(float(WinogradKernel::kZero));
            }
            transform_weights(g, half[v][i]);
          }
        }
        for (int j = 0; j < kSize; ++j) {
          Floats columns[kVectors][kSize];
          for (int v = 0; v < kVectors; ++v) {
            transform_weights({half[v][0][j], half[v][1][j], half[v][2][j]}, columns[v]);
          }
          for (int i = 0; i < kSize; ++i) put(to + (i * kSize + j) * stride, {columns[0][i], columns[1][i]});
        }
      }
    }
  }
}

}  // namespace
}  // namespace MDNET_NAMESPACE
