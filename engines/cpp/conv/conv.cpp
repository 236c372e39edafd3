// A depthwise convolution with SiLU on the host's threads, some rows to a task; that of an image, a row to a task.
#include "conv/conv.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "simd/builds.h"

namespace {

constexpr int64_t kTask = 16384;  // elements

constexpr const MdnetConvKernel* kBuilds[] = MDNET_BUILDS(conv);

struct Conv {
  const MdnetConvSilu& call;
  const MdnetConvKernel& kernel;

  int64_t rows_of_a_task() const { return kTask / call.length > 1 ? kTask / call.length : 1; }
  int64_t tasks() const { return (call.rows + rows_of_a_task() - 1) / rows_of_a_task(); }

  void run(int64_t task) const {
    const int64_t first = task * rows_of_a_task(), end = first + rows_of_a_task();
    for (int64_t row = first; row < end && row < call.rows; ++row) kernel.row(call, row);
  }
};

class ImageConv {
 public:
  ImageConv(const MdnetImageConv& call, const MdnetConvKernel& kernel)
      : call_(call),
        kernel_(kernel),
        taps_(call.kernel_height * call.kernel_width * call.channels),
        height_(call.height + 2 * call.pad - call.kernel_height + 1),
        width_(call.width + 2 * call.pad - call.kernel_width + 1),
        padded_((call.outputs + kPadding - 1) / kPadding * kPadding),
        weights_(static_cast<float*>(calloc(size_t((taps_ + 1) * padded_), sizeof(float)))) {
    if (weights_) pack();
  }
  ~ImageConv() { free(weights_); }
  ImageConv(const ImageConv&) = delete;
  ImageConv& operator=(const ImageConv&) = delete;
  int status() const { return weights_ ? status_.load() : int(MDNET_NO_MEMORY); }
  int64_t tasks() const { return call_.batch * height_; }

  void run(int64_t task) {
    constexpr int64_t kPlaces = MdnetConvKernel::kPlaces;
    const int64_t image = task / height_, row = task % height_, channels = call_.channels;
    // The input lines of a row, with the zeros on both sides, and some behind for places that are not stored.
    const int64_t line = (call_.width + 2 * call_.pad + kPlaces) * channels;
    float* inputs = static_cast<float*>(calloc(size_t(call_.kernel_height * line), sizeof(float)));
    if (!inputs) return status_.store(MDNET_NO_MEMORY);
    const int64_t length = call_.width * channels;
    for (int64_t k = 0; k < call_.kernel_height; ++k) {
      const int64_t from = row - call_.pad + k;
      if (from < 0 || from >= call_.height) continue;
      memcpy(inputs + k * line + call_.pad * channels, call_.x + (image * call_.height + from) * length,
             size_t(length) * sizeof(float));
    }
    for (int64_t first = 0; first < width_; first += kPlaces) {
      const int64_t count = width_ - first < kPlaces ? width_ - first : kPlaces;
      kernel_.places(inputs + first * channels, call_.kernel_height, line, call_.kernel_width * channels, channels,
                     weights_, call_.outputs, padded_, call_.y + (task * width_ + first) * call_.outputs, count);
    }
    free(inputs);
  }

 private:
  static constexpr int64_t kPadding = 64;  // what the widest kernel reads at a time

  // From outputs x channels x kernel to kernel x channels x outputs, as the inputs of a place lie.
  void pack() {
    const int64_t places = call_.kernel_height * call_.kernel_width;
    for (int64_t o = 0; o < call_.outputs; ++o) {
      for (int64_t c = 0; c < call_.channels; ++c) {
        for (int64_t p = 0; p < places; ++p) {
          weights_[(p * call_.channels + c) * padded_ + o] = call_.w[(o * call_.channels + c) * places + p];
        }
      }
      weights_[taps_ * padded_ + o] = call_.bias[o];
    }
  }

  const MdnetImageConv& call_;
  const MdnetConvKernel& kernel_;
  const int64_t taps_, height_, width_, padded_;
  float* const weights_;
  std::atomic<int> status_{MDNET_OK};
};

bool sensible(const MdnetImageConv& call) {
  return call.batch > 0 && call.height > 0 && call.width > 0 && call.channels > 0 && call.outputs > 0 &&
         call.kernel_height > 0 && call.kernel_width > 0 && call.pad >= 0 &&
         call.height + 2 * call.pad >= call.kernel_height && call.width + 2 * call.pad >= call.kernel_width;
}

bool sensible(const MdnetConvSilu& call) {
  return call.rows > 0 && call.channels > 0 && call.length > 0 && call.taps > 0 && call.before >= 0 &&
         call.before < call.taps;
}

}  // namespace

extern "C" {

int mdnet_conv_silu(const MdnetConvSilu* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || !sensible(*call)) return MDNET_BAD_ARGUMENT;
  const MdnetConvKernel* kernel = build_for(call->isa, kBuilds);
  if (!kernel) return MDNET_NO_ISA;
  Conv conv{*call, *kernel};
  parallel_for(
      host, [](void* conv, size_t i) { static_cast<const Conv*>(conv)->run(int64_t(i)); }, &conv, size_t(conv.tasks()));
  return MDNET_OK;
}

int mdnet_image_conv(const MdnetImageConv* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || !sensible(*call)) return MDNET_BAD_ARGUMENT;
  const MdnetConvKernel* kernel = build_for(call->isa, kBuilds);
  if (!kernel) return MDNET_NO_ISA;
  ImageConv conv(*call, *kernel);
  if (conv.status() == MDNET_OK) {
    parallel_for(
        host, [](void* conv, size_t i) { static_cast<ImageConv*>(conv)->run(int64_t(i)); }, &conv,
        size_t(conv.tasks()));
  }
  return conv.status();
}

int mdnet_image_conv_here(const MdnetImageConv* call) { return mdnet_image_conv(call, in_turn, nullptr); }

int mdnet_conv_silu_here(const MdnetConvSilu* call) { return mdnet_conv_silu(call, in_turn, nullptr); }

}  // extern "C"
