// Winograd convolutions on the host's threads. A task has a block of tiles and some of its outputs.
#include "winograd/winograd.h"

#include <sched.h>
#include <string.h>

#include "common/arena.h"
#include "common/arithmetic.h"
#include "common/parallel.h"
#include "matmul/matmul.h"
#include "simd/builds.h"
#include "winograd/kernel.h"

MDNET_BUILDS(WinogradKernel, winograd);
#ifdef MDNET_X86
#include "simd/x86_features.h"

extern const WinogradKernel mdnet_avx512_bf16_winograd;
#endif

namespace {

constexpr int64_t kTile = WinogradKernel::kTile, kPositions = WinogradKernel::kPositions;

// Processors that this process may use, up to 8: hosts don't say on how many threads they run tasks, and with more,
// tasks would be so small that transforming their inputs took longest.
int64_t processors() {
  constexpr int kMost = 8;
  static const int known = [] {
    cpu_set_t usable;
    const int count = sched_getaffinity(0, sizeof usable, &usable) ? kMost : CPU_COUNT(&usable);
    return count < kMost ? count : kMost;
  }();
  return known;
}

const WinogradKernel* kernel_for(int32_t products, int32_t isa) {
  if (products == MDNET_WINOGRAD_FLOAT32) return build_for(isa, winograd_builds);
#ifdef MDNET_X86
  const bool wide = isa == MDNET_BEST || isa == MDNET_AVX512;
  if (products == MDNET_WINOGRAD_BFLOAT16 && wide && mdnet_has_bfloat16()) return &mdnet_avx512_bf16_winograd;
#endif
  return nullptr;
}

bool sensible(const MdnetWinograd& call) {
  return call.batch > 0 && call.height > 0 && call.width > 0 && call.weights && !call.scale == !call.offset &&
         (call.scale || !call.silu);
}

// How a call is cut into tasks.
class Blocks {
 public:
  explicit Blocks(const MdnetWinograd& call)
      : rows_(ceil_div(call.height, kTile)), columns_(ceil_div(call.width, kTile)) {
    const WinogradKernel& kernel = *call.weights->kernel;
    const int64_t tiles = kernel.tiles * (call.weights->scales ? 2 : 1);
    width_ = ceil_div(columns_, ceil_div(columns_, tiles));
    height_ = smaller(tiles / width_, rows_);
    panels_ = ceil_div(call.weights->outputs, kernel.columns);
    const int64_t blocks = call.batch * blocks_per_image();
    // Each task transforms its inputs anew, which takes 0.4 times as long as a panel.
    int64_t least = INT64_MAX;
    for (int64_t panels = panels_; panels > 0; --panels) {
      const int64_t turns = ceil_div(blocks * ceil_div(panels_, panels), processors());
      const int64_t time = turns * (10 * panels + 4);
      if (time < least) {
        least = time;
        panels_per_task_ = panels;
      }
    }
    tasks_ = blocks * tasks_per_block();
  }

  int64_t tasks() const { return tasks_; }
  int64_t tiles() const { return width_ * height_; }  // of a block at most

  WinogradBlock operator[](int64_t task) const {
    const int64_t part = task % tasks_per_block(), block = task / tasks_per_block() % blocks_per_image();
    const int64_t row = block / blocks_per_row() * height_, column = block % blocks_per_row() * width_;
    const int64_t panel = part * panels_per_task_;
    return {task / tasks_per_block() / blocks_per_image(),
            row,
            column,
            smaller(rows_ - row, height_),
            smaller(columns_ - column, width_),
            panel,
            smaller(panels_ - panel, panels_per_task_)};
  }

 private:
  int64_t blocks_per_row() const { return ceil_div(columns_, width_); }
  int64_t blocks_per_image() const { return blocks_per_row() * ceil_div(rows_, height_); }
  int64_t tasks_per_block() const { return ceil_div(panels_, panels_per_task_); }

  const int64_t rows_, columns_;  // of an image's tiles
  int64_t width_, height_;        // of a block, in tiles
  int64_t panels_, panels_per_task_, tasks_;
};

// The structure, and behind it `each` bytes for each pair of a channel and an output, padded, and scales if there are.
// Null where memory ran out.
MdnetWinogradWeights* allocated(const WinogradKernel* kernel, int64_t channels, int64_t outputs, int64_t each,
                                const float* scales) {
  const size_t head = aligned(sizeof(MdnetWinogradWeights));
  const size_t size = aligned(size_t(each * round_up(channels, kernel->channels) * round_up(outputs, kernel->columns)));
  char* memory = allocate<char>(head + size + (scales ? size_t(outputs) * sizeof *scales : 0));
  if (!memory) return nullptr;
  auto* weights = reinterpret_cast<MdnetWinogradWeights*>(memory);
  *weights = {kernel, channels, outputs, memory + head, nullptr};
  if (scales) {
    memcpy(memory + head + size, scales, size_t(outputs) * sizeof *scales);
    weights->scales = reinterpret_cast<float*>(memory + head + size);
  }
  return weights;
}

}  // namespace

extern "C" {

MdnetWinogradWeights* mdnet_winograd_pack(const float* w, int64_t channels, int64_t outputs, int32_t products,
                                          int32_t isa) {
  const WinogradKernel* kernel = kernel_for(products, isa);
  if (!kernel || !w || channels < 1 || outputs < 1) return nullptr;
  MdnetWinogradWeights* weights = allocated(kernel, channels, outputs, kPositions * kernel->element_bytes, nullptr);
  if (weights) kernel->pack(w, channels, outputs, const_cast<char*>(weights->panels));
  return weights;
}

MdnetWinogradWeights* mdnet_winograd_pack_bytes(const int8_t* w, const float* scale, int64_t channels, int64_t outputs,
                                                int32_t products, int32_t isa) {
  const WinogradKernel* kernel = kernel_for(products, isa);
  if (!kernel || !w || !scale || channels < 1 || outputs < 1) return nullptr;
  MdnetWinogradWeights* weights = allocated(kernel, channels, outputs, WinogradKernel::kTaps, scale);
  if (weights) {
    kernel->pack_bytes(w, channels, outputs, reinterpret_cast<uint8_t*>(const_cast<char*>(weights->panels)));
  }
  return weights;
}

int mdnet_winograd_products(void) {
#ifdef MDNET_X86
  if (mdnet_has_bfloat16()) return MDNET_WINOGRAD_BFLOAT16;
  if (x86_has(kAvx2Fma) && !x86_has(kVnni)) return MDNET_WINOGRAD_FLOAT32;
#endif
  return -1;
}

int mdnet_winograd(const MdnetWinograd* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || !sensible(*call)) return MDNET_BAD_ARGUMENT;
  const WinogradKernel& kernel = *call->weights->kernel;
  const Blocks blocks(*call);
  return Host{parallel_for, host}.run_and_check(blocks.tasks(), [&](int64_t task) -> int {
    const Buffer<char> scratch(kernel.scratch_bytes(*call->weights, blocks.tiles()));
    if (!scratch) return MDNET_NO_MEMORY;
    kernel.run(*call, blocks[task], scratch.data());
    return MDNET_OK;
  });
}

}  // extern "C"
