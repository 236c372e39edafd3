// A block of tiles: transform, multiply, transform back. CMake compiles this file once per instruction set, and once
// more for products in bfloat16 with AVX-512.
//
// Channels lie side by side and are the lanes of a vector, so that the transforms need no step across lanes.
#include <utility>

#include "common/arithmetic.h"
#include "common/buffer.h"
#include "quantised/bytes.h"
#include "simd/builds.h"
#include "winograd/weights.h"

namespace MDNET_NAMESPACE {
namespace {

// Where the values of a block lie. Positions are a cache line further apart than their values need: at a distance of
// a power of 2 they would compete for a few places of the cache.
struct Layout {
  int64_t channels;                  // rounded up
  int64_t input_stride, sum_stride;  // from a position to the next: elements, floats
  Layout(int64_t channels_of_x, int64_t tiles)
      : channels(round_up(channels_of_x, kChannels)),
        input_stride(tiles * channels + kLine / int64_t(sizeof(Element))),
        sum_stride(tiles * kColumns + kLine / int64_t(sizeof(float))) {}
  int64_t input_bytes() const { return int64_t(aligned(size_t(kPositions * input_stride) * sizeof(Element))); }
  int64_t bytes() const { return input_bytes() + kPositions * sum_stride * int64_t(sizeof(float)); }
};

// --- x ---

inline Floats some(const float* from, int64_t count) { return read<float>(from, count); }
inline Floats some(const uint8_t* from, int64_t count) {
  if (count >= W) return widened(from);
  uint8_t values[16] = {};
  if (count > 0) memcpy(values, from, size_t(count));
  return widened(values);
}

enum Prologue { kAsIs, kScaled, kSilu };

// f(x) for some channels of an image, but for the factor x_scale of bytes that are not scaled otherwise.
template <typename X, Prologue kind>
class Input {
 public:
  Input(const MdnetWinograd& call, int64_t image, int64_t channel, int64_t channels)
      : count_(channels - channel), zero_point_(splat(float(call.x_zero_point))) {
    if constexpr (kind != kAsIs) {
      const int64_t first = image * channels + channel;
      for (int v = 0; v < kVectors; ++v) {
        const int64_t skipped = smaller(v * W, count_);  // or the address could lie past the end
        scale_[v] = some(call.scale + first + skipped, count_ - skipped);
        offset_[v] = some(call.offset + first + skipped, count_ - skipped);
        if constexpr (sizeof(X) == 1) scale_[v] *= call.x_scale;
      }
    }
  }

  template <bool all>
  Floats at(const X* pixel, int v) const {
    Floats value;
    if constexpr (all) {
      value = widened(pixel + v * W);
    } else {
      const int64_t skipped = smaller(v * W, count_);
      value = some(pixel + skipped, count_ - skipped);
    }
    if constexpr (sizeof(X) == 1) value -= zero_point_;
    if constexpr (kind != kAsIs) value = multiply_add<float>(value, scale_[v], offset_[v]);
    if constexpr (kind == kSilu) value = silu<float>(value);
    return value;
  }

 private:
  const int64_t count_;
  const Floats zero_point_;
  Floats scale_[kVectors], offset_[kVectors];
};

// Some channels of all tiles of a block, `to` the first of them.
template <typename X, Prologue kind, bool all>
void transform_channels(const MdnetWinograd& call, const WinogradBlock& block, const Layout& layout, int64_t channel,
                        Element* to) {
  const int64_t channels = call.weights->channels, line = call.width * channels;
  const Input<X, kind> input(call, block.image, channel, channels);
  const X* x = static_cast<const X*>(call.x) + block.image * call.height * line + channel;
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t top = (block.first_row + i) * kTile - 1, left = block.first_column * kTile - 1;
    const int64_t first = larger(-top, 0), end = smaller(call.height - top, kSize);  // rows inside of the image
    // Columns of x, transformed: a tile reads six, two of which were the last ones of the tile before.
    constexpr int kKept = 8;
    Floats columns[kKept][kSize][kVectors];
    const auto add_column = [&](int64_t j) {
      Floats(&column)[kSize][kVectors] = columns[j % kKept];
      const int64_t at = left + j;
      if (at < 0 || at >= call.width) {
        for (int r = 0; r < kSize; ++r) {
          for (int v = 0; v < kVectors; ++v) column[r][v] = Floats{};
        }
        return;
      }
      const X* pixel = x + top * line + at * channels;
      for (int v = 0; v < kVectors; ++v) {
        Floats d[kSize] = {};
        for (int r = 0; r < kSize; ++r) {
          if (r >= first && r < end) d[r] = input.template at<all>(pixel + r * line, v);
        }
        transform_input(d);
        for (int r = 0; r < kSize; ++r) column[r][v] = d[r];
      }
    };
    add_column(0);
    add_column(1);
    for (int64_t j = 0; j < block.columns; ++j, to += layout.channels) {
      for (int64_t k = 2; k < kSize; ++k) add_column(j * kTile + k);
      Element* place = to;
      for (int r = 0; r < kSize; ++r) {
        Floats d[kVectors][kSize];
        for (int v = 0; v < kVectors; ++v) {
          for (int k = 0; k < kSize; ++k) d[v][k] = columns[(j * kTile + k) % kKept][r][v];
          transform_input(d[v]);
        }
        for (int k = 0; k < kSize; ++k, place += layout.input_stride) put(place, {d[0][k], d[1][k]});
      }
    }
  }
}

template <typename X, Prologue kind>
void transform_block(const MdnetWinograd& call, const WinogradBlock& block, const Layout& layout, Element* to) {
  const int64_t channels = call.weights->channels;
  for (int64_t c = 0; c < channels; c += kChannels) {
    const auto chosen =
        c + kChannels <= channels ? transform_channels<X, kind, true> : transform_channels<X, kind, false>;
    chosen(call, block, layout, c, to + c);
  }
}

template <typename X>
void transform_block(const MdnetWinograd& call, const WinogradBlock& block, const Layout& layout, Element* to) {
  const auto chosen =
      !call.scale ? transform_block<X, kAsIs> : (call.silu ? transform_block<X, kSilu> : transform_block<X, kScaled>);
  chosen(call, block, layout, to);
}

// --- products ---

inline Floats multiply_add_factor(Factor a, const Floats& b, Floats sum) {
#ifdef MDNET_BFLOAT16
  return _mm512_dpbf16_ps(sum, __m512bh(_mm512_set1_epi32(int32_t(a))), __m512bh(b));
#else
  return multiply_add<float>(splat(a), b, sum);
#endif
}

// A strip of weights that is multiplied, and what of the next ones is asked for meanwhile: `step` bytes at each factor.
struct Strip {
  const Element* values;
  const char* ahead;
  int64_t step;
};

// Sums of one position for some tiles: rows of a, `factors` long and `stride` apart, by a strip at that position.
template <int rows>
void multiply(const Factor* a, int64_t stride, int64_t factors, const Strip& strip, float* to) {
  Floats sums[rows][kVectors] = {};
  const Factor* thirds[(rows + 2) / 3];
  for (int third = 0; third < (rows + 2) / 3; ++third) thirds[third] = a + third * 3 * stride;
  const float* values = reinterpret_cast<const float*>(strip.values);
  const char* ahead = strip.ahead;
  for (int64_t k = 0; k < factors; ++k, values += kStrip, ahead += strip.step) {
    __builtin_prefetch(ahead);
    Floats b[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) b[v] = load<Floats>(values + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Factor factor = thirds[r / 3][k + r % 3 * stride];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add_factor(factor, b[v], sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(to + r * kColumns + v * W, sums[r][v]);
  }
}

using Multiply = void (*)(const Factor*, int64_t, int64_t, const Strip&, float*);

template <size_t... I>
constexpr Multiply multiply_of(size_t rows, std::index_sequence<I...>) {
  constexpr Multiply all[] = {multiply<int(I) + 1>...};
  return all[rows - 1];
}

// What finish_block will read and write of a panel, asked for while its products are made: the lines of a place lie far
// from those of the next one, so the processor does not ask for them by itself.
class Ahead {
 public:
  Ahead(const MdnetWinograd& call, const WinogradBlock& block, int64_t first_output)
      : width_(smaller(block.columns * kTile, call.width - block.first_column * kTile)),
        skipped_(call.width - width_),
        places_(width_ * smaller(block.rows * kTile, call.height - block.first_row * kTile)),
        at_((block.image * call.height + block.first_row * kTile) * call.width + block.first_column * kTile),
        y_(static_cast<const char*>(call.y), call.y_is_uint8, first_output, call.weights->outputs),
        residual_(static_cast<const char*>(call.residual), call.residual_is_uint8, first_output,
                  call.weights->outputs) {}

  // The share of one position.
  void operator()(int p) {
    for (const int64_t end = (p + 1) * places_ / kPositions; place_ < end; ++place_) {
      y_.ask(at_);
      if (residual_.data) residual_.ask(at_);
      ++at_;
      if (++column_ == width_) {
        column_ = 0;
        at_ += skipped_;
      }
    }
  }

 private:
  struct Tensor {
    Tensor(const char* tensor, bool of_bytes, int64_t first_output, int64_t outputs)
        : data(tensor),
          size(of_bytes ? 1 : int64_t(sizeof(float))),
          first(first_output * size),
          last(smaller(first_output + kColumns, outputs) * size - 1),
          stride(outputs * size) {}
    void ask(int64_t place) const {
      const char* values = data + place * stride;
      for (int64_t at = first; at <= last; at += kLine) __builtin_prefetch(values + at, 0, 2);
      __builtin_prefetch(values + last, 0, 2);
    }
    const char* data;
    int64_t size, first, last, stride;  // bytes
  };

  const int64_t width_, skipped_, places_;  // of an image's places, those of the block
  int64_t at_, place_ = 0, column_ = 0;     // the next place: of the batch, of the block, of its row
  const Tensor y_, residual_;
};

// All tiles of a block at all positions; `panel` has the weights of some outputs, positions `size` apart.
void multiply_block(const Layout& layout, int64_t tiles, const Element* inputs, const Element* panel, int64_t size,
                    float* sums, Ahead ahead_of_y) {
  const int64_t parts = ceil_div(tiles, kRows);
  const int64_t factors = layout.channels / kPair;
  for (int p = 0; p < kPositions; ++p, inputs += layout.input_stride, panel += size, sums += layout.sum_stride) {
    ahead_of_y(p);
    // The weights of the next position are asked for evenly while those of this one are multiplied.
    const int64_t step = kColumns * kPair * int64_t(sizeof(Element)) / (parts * (kColumns / kStrip));
    const char* ahead = reinterpret_cast<const char*>(panel + size);
    for (int64_t part = 0, first = 0; part < parts; ++part) {
      const int64_t end = (part + 1) * tiles / parts;  // parts of almost the same size
      const Multiply chosen = multiply_of(size_t(end - first), std::make_index_sequence<kRows>{});
      const Factor* a = reinterpret_cast<const Factor*>(inputs + first * layout.channels);
      for (int64_t column = 0; column < kColumns; column += kStrip, ahead += factors * step) {
        chosen(a, factors, factors, {panel + column * layout.channels, ahead, step}, sums + first * kColumns + column);
      }
      first = end;
    }
  }
}

// --- y ---

// The four places of a row of a tile that are inside of the image, in a vector of outputs, `count` of which exist.
template <typename Residual, typename Y>
class Output {
 public:
  Output(const MdnetWinograd& call, int64_t output)
      : outputs_(call.weights->outputs),
        count_(outputs_ - output),
        bias_(call.bias ? some(call.bias + output, count_) : Floats{}),
        scale_(splat(call.x_is_uint8 && !call.scale ? call.x_scale : 1.0f) *
               (call.weights->scales ? some(call.weights->scales + output, count_) : splat(1.0f))),
        residual_(static_cast<const Residual*>(call.residual)),
        y_(static_cast<Y*>(call.y)),
        dequantise_(call.residual_scale, call.residual_zero_point),
        quantise_(sizeof(Y) == 1 ? call.y_scale : 1.0f, call.y_zero_point) {}

  void write_row(const Floats (&sums)[kTile], int64_t at, int64_t places) const {
    for (int64_t k = 0; k < places; ++k, at += outputs_) {
      Floats value = multiply_add<float>(sums[k], scale_, bias_);
      if (residual_) value += dequantise(at);
      if constexpr (sizeof(Y) != 1) {
        write<float>(y_ + at, value, count_);
      } else if (count_ >= W) {
        quantise_(y_ + at, value);
      } else {
        uint8_t bytes[W];
        quantise_(bytes, value);
        memcpy(y_ + at, bytes, size_t(count_));
      }
    }
  }

 private:
  Floats dequantise(int64_t at) const {
    if (count_ >= W) return dequantise_(residual_ + at);
    Residual values[W] = {};
    memcpy(values, residual_ + at, size_t(count_) * sizeof(Residual));
    return dequantise_(values);
  }

  const int64_t outputs_, count_;
  const Floats bias_, scale_;
  const Residual* const residual_;
  Y* const y_;
  const Dequantise dequantise_;
  const Quantise quantise_;
};

template <typename Residual, typename Y>
void finish_block(const MdnetWinograd& call, const WinogradBlock& block, const Layout& layout, const float* sums,
                  int64_t first_output) {
  const int64_t outputs = call.weights->outputs, line = call.width * outputs;
  for (int64_t o = first_output; o < smaller(first_output + kColumns, outputs); o += W) {
    const Output<Residual, Y> output(call, o);
    const float* from = sums + (o - first_output);
    for (int64_t i = 0; i < block.rows; ++i) {
      for (int64_t j = 0; j < block.columns; ++j, from += kColumns) {
        Floats half[kTile][kSize];
        for (int k = 0; k < kSize; ++k) {
          Floats m[kSize], column[kTile];
          for (int r = 0; r < kSize; ++r) m[r] = load<Floats>(from + (r * kSize + k) * layout.sum_stride);
          transform_output(m, column);
          for (int r = 0; r < kTile; ++r) half[r][k] = column[r];
        }
        const int64_t top = (block.first_row + i) * kTile, left = (block.first_column + j) * kTile;
        const int64_t start = (block.image * call.height + top) * line + left * outputs + o;
        for (int64_t r = 0; r < kTile && top + r < call.height; ++r) {
          Floats values[kTile];
          transform_output(half[r], values);
          output.write_row(values, start + r * line, smaller(call.width - left, kTile));
        }
      }
    }
  }
}

void finish_block_any(const MdnetWinograd& call, const WinogradBlock& block, const Layout& layout, const float* sums,
                      int64_t first_output) {
  const auto chosen = call.residual_is_uint8
                          ? (call.y_is_uint8 ? finish_block<uint8_t, uint8_t> : finish_block<uint8_t, float>)
                          : (call.y_is_uint8 ? finish_block<float, uint8_t> : finish_block<float, float>);
  chosen(call, block, layout, sums, first_output);
}

// --- a block ---

// Of a panel of transformed weights: from a position to the next.
int64_t weights_stride(const Layout& layout, bool own) {
  return layout.channels * kColumns + (own ? kLine / int64_t(sizeof(Element)) : 0);
}

int64_t scratch_bytes(const MdnetWinogradWeights& weights, int64_t tiles) {
  const Layout layout(weights.channels, tiles);
  const int64_t own = weights.scales ? kPositions * weights_stride(layout, true) : 0;
  return layout.bytes() + own * int64_t(sizeof(Element));
}

void run(const MdnetWinograd& call, const WinogradBlock& block, char* scratch) {
  const int64_t tiles = block.rows * block.columns;
  const Layout layout(call.weights->channels, tiles);
  Element* inputs = reinterpret_cast<Element*>(scratch);
  float* sums = reinterpret_cast<float*>(scratch + layout.input_bytes());
  Element* own = reinterpret_cast<Element*>(scratch + layout.bytes());
  const int64_t stride = weights_stride(layout, call.weights->scales);
  (call.x_is_uint8 ? transform_block<uint8_t> : transform_block<float>)(call, block, layout, inputs);
  for (int64_t panel = block.first_panel; panel < block.first_panel + block.panels; ++panel) {
    const Element* weights = own;
    if (call.weights->scales) {
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(call.weights->panels);
      transform_panel(bytes + panel * kTaps * layout.channels * kColumns, layout.channels, stride, own);
    } else {
      weights = reinterpret_cast<const Element*>(call.weights->panels) + panel * kPositions * stride;
    }
    multiply_block(layout, tiles, inputs, weights, stride, sums, Ahead(call, block, panel * kColumns));
    finish_block_any(call, block, layout, sums, panel * kColumns);
  }
}

}  // namespace
}  // namespace MDNET_NAMESPACE

extern const WinogradKernel MDNET_THIS_BUILD(winograd) = {
    MDNET_NAMESPACE::kColumns, MDNET_NAMESPACE::kChannels,  MDNET_NAMESPACE::kTiles, sizeof(MDNET_NAMESPACE::Element),
    MDNET_NAMESPACE::pack,     MDNET_NAMESPACE::pack_bytes, MDNET_NAMESPACE::run,    MDNET_NAMESPACE::scratch_bytes};
