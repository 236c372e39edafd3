// Both convolutions on the host's threads. A task has some rows of a depthwise one, or one row of an image.
#include "conv/conv.h"

#include <string.h>

#include "common/arithmetic.h"
#include "common/buffer.h"
#include "common/parallel.h"
#include "conv/kernel.h"
#include "simd/builds.h"

MDNET_BUILDS(ConvKernel, conv);

namespace {

constexpr int64_t kTask = 16384;  // elements in a task of a depthwise convolution

class ImageConv {
 public:
  ImageConv(const MdnetImageConv& call, const ConvKernel& kernel)
      : call_(call),
        kernel_(kernel),
        taps_(call.kernel_height * call.kernel_width * call.channels),
        height_(call.height + 2 * call.pad - call.kernel_height + 1),
        width_(call.width + 2 * call.pad - call.kernel_width + 1),
        padded_(round_up(call.outputs, kPadding)),
        weights_((taps_ + 1) * padded_) {
    if (weights_) pack();
  }
  explicit operator bool() const { return bool(weights_); }
  int64_t tasks() const { return call_.batch * height_; }

  int run(int64_t task) const {
    constexpr int64_t kPixels = ConvKernel::kPixels;
    const int64_t image = task / height_, row = task % height_, channels = call_.channels;
    // The input lines of a row with zeros on both sides, and more zeros at the end for pixels that are not stored.
    const int64_t line = (call_.width + 2 * call_.pad + kPixels) * channels;
    const ZeroedBuffer<float> inputs(call_.kernel_height * line);
    if (!inputs) return MDNET_NO_MEMORY;
    const int64_t length = call_.width * channels;
    for (int64_t k = 0; k < call_.kernel_height; ++k) {
      const int64_t from = row - call_.pad + k;
      if (from < 0 || from >= call_.height) continue;
      memcpy(inputs.data() + k * line + call_.pad * channels, call_.x + (image * call_.height + from) * length,
             size_t(length) * sizeof(float));
    }
    for (int64_t first = 0; first < width_; first += kPixels) {
      kernel_.image(inputs.data() + first * channels, call_.kernel_height, line, call_.kernel_width * channels,
                    channels, weights_.data(), call_.outputs, padded_,
                    call_.y + (task * width_ + first) * call_.outputs, smaller(width_ - first, kPixels));
    }
    return MDNET_OK;
  }

 private:
  static constexpr int64_t kPadding = 64;  // weights that the widest kernel reads at a time

  // From outputs x channels x kernel to kernel x channels x outputs: the order in which a pixel reads its inputs.
  void pack() const {
    const int64_t taps = call_.kernel_height * call_.kernel_width;
    for (int64_t o = 0; o < call_.outputs; ++o) {
      for (int64_t c = 0; c < call_.channels; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          weights_.data()[(tap * call_.channels + c) * padded_ + o] = call_.w[(o * call_.channels + c) * taps + tap];
        }
      }
      weights_.data()[taps_ * padded_ + o] = call_.bias[o];
    }
  }

  const MdnetImageConv& call_;
  const ConvKernel& kernel_;
  const int64_t taps_, height_, width_, padded_;  // taps of all channels; sizes of y; outputs with padding
  const ZeroedBuffer<float> weights_;
};

bool sensible(const MdnetImageConv& call) {
  return call.batch > 0 && call.height > 0 && call.width > 0 && call.channels > 0 && call.outputs > 0 &&
         call.kernel_height > 0 && call.kernel_width > 0 && call.pad >= 0 &&
         call.height + 2 * call.pad >= call.kernel_height && call.width + 2 * call.pad >= call.kernel_width;
}

bool sensible(const MdnetDepthwiseConvSilu& call) {
  return call.rows > 0 && call.channels > 0 && call.length > 0 && call.taps > 0 && call.before >= 0 &&
         call.before < call.taps;
}

}  // namespace

extern "C" {

int mdnet_depthwise_conv_silu(const MdnetDepthwiseConvSilu* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || !sensible(*call)) return MDNET_BAD_ARGUMENT;
  const ConvKernel* kernel = build_for(call->isa, conv_builds);
  if (!kernel) return MDNET_NO_ISA;
  const int64_t rows = larger(kTask / call->length, 1);
  Host{parallel_for, host}.run(ceil_div(call->rows, rows), [&](int64_t task) {
    const int64_t end = smaller((task + 1) * rows, call->rows);
    for (int64_t row = task * rows; row < end; ++row) kernel->depthwise_silu(*call, row);
  });
  return MDNET_OK;
}

int mdnet_image_conv(const MdnetImageConv* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || !sensible(*call)) return MDNET_BAD_ARGUMENT;
  const ConvKernel* kernel = build_for(call->isa, conv_builds);
  if (!kernel) return MDNET_NO_ISA;
  const ImageConv conv(*call, *kernel);
  if (!conv) return MDNET_NO_MEMORY;
  return Host{parallel_for, host}.run_and_check(conv.tasks(), [&](int64_t task) { return conv.run(task); });
}

}  // extern "C"
