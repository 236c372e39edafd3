// Group normalisation in two passes over blocks of places, on the host's threads: sums, then, when each group's mean
// and variance are known, y. The residual sum and GEGLU have one pass. What a block is depends on nothing but the
// shapes, so no result depends on the number of threads.
#include "quantised/quantised.h"

#include <math.h>
#include <stdlib.h>

#include "simd/builds.h"

namespace {

constexpr int64_t kBlock = 32768;  // elements of a block, or more where an image has more than kBlocks of them
constexpr int64_t kBlocks = 64;
constexpr int64_t kPadding = 16;  // the widest vector

constexpr const MdnetQuantisedKernel* kBuilds[] = MDNET_BUILDS(quantised);

bool sensible(const MdnetGroupNorm& call) {
  return call.batch > 0 && call.channels > 0 && call.places > 0 && call.groups > 0 && call.channels % call.groups == 0;
}

int64_t block_places(const MdnetGroupNorm& call) {
  const int64_t wanted = call.places * call.channels / kBlock;
  const int64_t blocks = wanted < 1 ? 1 : wanted > kBlocks ? kBlocks : wanted;
  return (call.places + blocks - 1) / blocks;
}

class GroupNorm {
 public:
  GroupNorm(const MdnetGroupNorm& call, const MdnetQuantisedKernel& kernel)
      : call_(call),
        kernel_(kernel),
        block_(block_places(call)),
        blocks_((call.places + block_ - 1) / block_),
        padded_(call.channels + kPadding),
        sums_(static_cast<double*>(malloc(size_t(tasks() * 2 * call.channels) * sizeof(double)))),
        channels_(static_cast<float*>(calloc(size_t(call.batch * 3 * padded_), sizeof(float)))) {}
  ~GroupNorm() {
    free(sums_);
    free(channels_);
  }
  GroupNorm(const GroupNorm&) = delete;
  GroupNorm& operator=(const GroupNorm&) = delete;
  explicit operator bool() const { return sums_ && channels_; }

  void run(MdnetParallelFor parallel_for, void* host) {
    parallel_for(
        host,
        [](void* norm, size_t i) {
          GroupNorm& self = *static_cast<GroupNorm*>(norm);
          double* sums = self.sums(int64_t(i));
          self.kernel_.add_up(self.call_, self.places(int64_t(i)), sums, sums + self.call_.channels);
        },
        this, size_t(tasks()));
    for (int64_t image = 0; image < call_.batch; ++image) settle(image);
    parallel_for(
        host,
        [](void* norm, size_t i) {
          GroupNorm& self = *static_cast<GroupNorm*>(norm);
          const MdnetPlaces places = self.places(int64_t(i));
          self.kernel_.apply(self.call_, places, self.channels(places.image));
        },
        this, size_t(tasks()));
  }

 private:
  int64_t tasks() const { return call_.batch * blocks_; }

  MdnetPlaces places(int64_t task) const {
    const int64_t first = task % blocks_ * block_, left = call_.places - first;
    return {task / blocks_, first, left < block_ ? left : block_};
  }

  double* sums(int64_t task) { return sums_ + task * 2 * call_.channels; }

  MdnetChannels channels(int64_t image) {
    float* first = channels_ + image * 3 * padded_;
    return {first, first + padded_, first + 2 * padded_};
  }

  // Mean and scale of an image's channels from the sums of its blocks, which end up in those of the first.
  void settle(int64_t image) {
    const int64_t n = call_.channels, width = n / call_.groups;
    double *total = sums(image * blocks_), *squares = total + n;
    for (int64_t block = 1; block < blocks_; ++block) {
      const double* more = sums(image * blocks_ + block);
      for (int64_t i = 0; i < 2 * n; ++i) total[i] += more[i];
    }
    const float* about = call_.bytes ? nullptr : static_cast<const float*>(call_.x) + image * call_.places * n;
    for (int64_t first = 0; first < n; first += width) {
      double mean = 0, variance = 0;
      for (int64_t c = first; c < first + width; ++c) {  // each channel's own mean and variance take their sums' place
        total[c] /= double(call_.places);
        squares[c] = squares[c] / double(call_.places) - total[c] * total[c];
        if (about) total[c] += about[c];
        mean += total[c];
      }
      mean /= double(width);
      for (int64_t c = first; c < first + width; ++c) {
        variance += squares[c] + (total[c] - mean) * (total[c] - mean);
      }
      variance /= double(width);
      write_channels(channels(image), first, first + width, mean, variance < 0 ? 0 : variance);
    }
  }

  void write_channels(const MdnetChannels& to, int64_t first, int64_t end, double mean, double variance) {
    const double unit = call_.bytes ? double(call_.x_scale) : 1.0;
    const double inverse = unit / sqrt(variance * unit * unit + double(call_.epsilon));
    // What a float can't hold of the mean goes into the offset: values may lie close together, far from 0.
    const float near = call_.bytes ? float(int(mean)) : float(mean);
    for (int64_t c = first; c < end; ++c) {
      const double scale = double(call_.gamma[c]) * inverse;
      to.mean[c] = near;
      to.scale[c] = float(scale);
      to.offset[c] = float(double(call_.beta[c]) - (mean - double(near)) * scale);
    }
  }

  const MdnetGroupNorm& call_;
  const MdnetQuantisedKernel& kernel_;
  const int64_t block_, blocks_, padded_;
  double* const sums_;     // of each task: channels, and channels of squares
  float* const channels_;  // of each image
};

struct Sum {
  const MdnetResidualSum& call;
  const MdnetQuantisedKernel& kernel;

  int64_t tasks() const { return (call.count + kBlock - 1) / kBlock; }

  void run(int64_t task) const {
    const int64_t first = task * kBlock, end = first + kBlock;
    kernel.sum(call, first, end < call.count ? end : call.count);
  }
};

struct Gate {
  const MdnetGeglu& call;
  const MdnetQuantisedKernel& kernel;

  int64_t rows_of_a_task() const { return kBlock / call.channels > 1 ? kBlock / call.channels : 1; }
  int64_t tasks() const { return (call.rows + rows_of_a_task() - 1) / rows_of_a_task(); }

  void run(int64_t task) const {
    const int64_t first = task * rows_of_a_task(), end = first + rows_of_a_task();
    kernel.geglu(call, first, end < call.rows ? end : call.rows);
  }
};

// Run the tasks of `pass` on the host's threads.
template <typename Pass>
void run_all(const Pass& pass, MdnetParallelFor parallel_for, void* host) {
  parallel_for(
      host, [](void* pass, size_t i) { static_cast<const Pass*>(pass)->run(int64_t(i)); }, const_cast<Pass*>(&pass),
      size_t(pass.tasks()));
}

}  // namespace

extern "C" {

int mdnet_group_norm(const MdnetGroupNorm* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || !sensible(*call)) return MDNET_BAD_ARGUMENT;
  const MdnetQuantisedKernel* kernel = build_for(call->isa, kBuilds);
  if (!kernel) return MDNET_NO_ISA;
  GroupNorm norm(*call, *kernel);
  if (!norm) return MDNET_NO_MEMORY;
  norm.run(parallel_for, host);
  return MDNET_OK;
}

int mdnet_residual_sum(const MdnetResidualSum* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || call->count <= 0) return MDNET_BAD_ARGUMENT;
  const MdnetQuantisedKernel* kernel = build_for(call->isa, kBuilds);
  if (!kernel) return MDNET_NO_ISA;
  run_all(Sum{*call, *kernel}, parallel_for, host);
  return MDNET_OK;
}

int mdnet_geglu(const MdnetGeglu* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || call->rows <= 0 || call->channels <= 0) return MDNET_BAD_ARGUMENT;
  const MdnetQuantisedKernel* kernel = build_for(call->isa, kBuilds);
  if (!kernel) return MDNET_NO_ISA;
  run_all(Gate{*call, *kernel}, parallel_for, host);
  return MDNET_OK;
}

int mdnet_group_norm_here(const MdnetGroupNorm* call) { return mdnet_group_norm(call, in_turn, nullptr); }

int mdnet_residual_sum_here(const MdnetResidualSum* call) { return mdnet_residual_sum(call, in_turn, nullptr); }

int mdnet_geglu_here(const MdnetGeglu* call) { return mdnet_geglu(call, in_turn, nullptr); }

}  // extern "C"
