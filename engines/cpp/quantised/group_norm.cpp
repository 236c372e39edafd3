// Group normalisation in two passes over blocks of pixels, on the host's threads: first sums, then, from each group's
// mean and variance, y. The blocks depend on the shapes alone, so no result depends on the number of threads.
#include <math.h>

#include "common/arithmetic.h"
#include "common/buffer.h"
#include "common/parallel.h"
#include "quantised/kernel.h"
#include "simd/builds.h"

MDNET_BUILDS(QuantisedKernel, quantised);

namespace {

constexpr int64_t kBlock = 32768;  // elements of a block; larger where an image would have more than kBlocks
constexpr int64_t kBlocks = 64;
constexpr int64_t kPadding = 16;  // floats of the widest vector

bool sensible(const MdnetGroupNorm& call) {
  return call.batch > 0 && call.channels > 0 && call.pixels > 0 && call.groups > 0 && call.channels % call.groups == 0;
}

int64_t pixels_of_a_block(const MdnetGroupNorm& call) {
  return ceil_div(call.pixels, smaller(larger(call.pixels * call.channels / kBlock, 1), kBlocks));
}

class GroupNorm {
 public:
  GroupNorm(const MdnetGroupNorm& call, const QuantisedKernel& kernel)
      : call_(call),
        kernel_(kernel),
        block_(pixels_of_a_block(call)),
        blocks_(ceil_div(call.pixels, block_)),
        padded_(call.channels + kPadding),
        sums_(tasks() * 2 * call.channels),
        normalisations_(call.batch * 3 * padded_) {}
  explicit operator bool() const { return sums_ && normalisations_; }

  void find(const Host& host) const {
    host.run(tasks(), [this](int64_t task) {
      kernel_.accumulate(call_, pixels(task), sums(task), sums(task) + call_.channels);
    });
    for (int64_t image = 0; image < call_.batch; ++image) find_normalisation(image);
  }

  void apply(const Host& host) const {
    host.run(tasks(), [this](int64_t task) { kernel_.normalise(call_, pixels(task), normalisation(task / blocks_)); });
  }

  Normalisation normalisation(int64_t image) const {
    float* first = normalisations_.data() + image * 3 * padded_;
    return {first, first + padded_, first + 2 * padded_};
  }

 private:
  int64_t tasks() const { return call_.batch * blocks_; }

  PixelRange pixels(int64_t task) const {
    const int64_t first = task % blocks_ * block_;
    return {task / blocks_, first, smaller(call_.pixels - first, block_)};
  }

  // A block's sums of each channel, followed by the sums of squares.
  double* sums(int64_t task) const { return sums_.data() + task * 2 * call_.channels; }

  // The sums of all blocks of an image are added to those of its first block, and then used up.
  void find_normalisation(int64_t image) const {
    const int64_t n = call_.channels, width = n / call_.groups;
    double *total = sums(image * blocks_), *squares = total + n;
    for (int64_t block = 1; block < blocks_; ++block) {
      const double* more = sums(image * blocks_ + block);
      for (int64_t i = 0; i < 2 * n; ++i) total[i] += more[i];
    }
    const float* origin = call_.x_is_uint8 ? nullptr : static_cast<const float*>(call_.x) + image * call_.pixels * n;
    for (int64_t first = 0; first < n; first += width) {
      double mean = 0, variance = 0;
      for (int64_t c = first; c < first + width; ++c) {  // mean and variance of the channel take the place of its sums
        total[c] /= double(call_.pixels);
        squares[c] = squares[c] / double(call_.pixels) - total[c] * total[c];
        if (origin) total[c] += origin[c];
        mean += total[c];
      }
      mean /= double(width);
      for (int64_t c = first; c < first + width; ++c) {
        variance += squares[c] + (total[c] - mean) * (total[c] - mean);
      }
      variance /= double(width);
      write(normalisation(image), first, first + width, mean, variance < 0 ? 0 : variance);
    }
  }

  void write(const Normalisation& to, int64_t first, int64_t end, double mean, double variance) const {
    const double unit = call_.x_is_uint8 ? double(call_.x_scale) : 1.0;
    const double inverse = unit / sqrt(variance * unit * unit + double(call_.epsilon));
    // The part of the mean that a float can't hold goes into the offset: values may lie close together, far from 0.
    const float near = call_.x_is_uint8 ? float(int(mean)) : float(mean);
    for (int64_t c = first; c < end; ++c) {
      const double scale = double(call_.gamma[c]) * inverse;
      to.mean[c] = near;
      to.scale[c] = float(scale);
      to.offset[c] = float(double(call_.beta[c]) - (mean - double(near)) * scale);
    }
  }

  const MdnetGroupNorm& call_;
  const QuantisedKernel& kernel_;
  const int64_t block_, blocks_, padded_;
  const Buffer<double> sums_;                 // of each task
  const ZeroedBuffer<float> normalisations_;  // of each image
};

}  // namespace

extern "C" {

int mdnet_group_norm(const MdnetGroupNorm* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || !sensible(*call)) return MDNET_BAD_ARGUMENT;
  const QuantisedKernel* kernel = build_for(call->isa, quantised_builds);
  if (!kernel) return MDNET_NO_ISA;
  const GroupNorm norm(*call, *kernel);
  if (!norm) return MDNET_NO_MEMORY;
  norm.find({parallel_for, host});
  norm.apply({parallel_for, host});
  return MDNET_OK;
}

int mdnet_group_norm_scale(const MdnetGroupNormScale* call, MdnetParallelFor parallel_for, void* host) {
  if (!call) return MDNET_BAD_ARGUMENT;
  MdnetGroupNorm whole = {};
  whole.batch = call->batch;
  whole.pixels = call->pixels;
  whole.channels = call->channels;
  whole.groups = call->groups;
  whole.x = call->x;
  whole.gamma = call->gamma;
  whole.beta = call->beta;
  whole.epsilon = call->epsilon;
  if (!sensible(whole)) return MDNET_BAD_ARGUMENT;
  const QuantisedKernel* kernel = build_for(call->isa, quantised_builds);
  if (!kernel) return MDNET_NO_ISA;
  const GroupNorm norm(whole, *kernel);
  if (!norm) return MDNET_NO_MEMORY;
  norm.find({parallel_for, host});
  for (int64_t image = 0; image < call->batch; ++image) {
    const Normalisation found = norm.normalisation(image);
    float *scale = call->scale + image * call->channels, *offset = call->offset + image * call->channels;
    for (int64_t c = 0; c < call->channels; ++c) {
      scale[c] = found.scale[c];
      offset[c] = float(double(found.offset[c]) - double(found.mean[c]) * double(found.scale[c]));
    }
  }
  return MDNET_OK;
}

}  // extern "C"
