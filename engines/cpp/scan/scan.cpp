// Choose the build of the kernel for this processor, and run its tasks on the host's threads.
#include <atomic>

#include "scan/kernel.h"
#include "simd/builds.h"

namespace {

constexpr const MdnetKernel* kBuilds[] = MDNET_BUILDS(kernel);

bool sensible(const MdnetScan& scan) {
  return scan.batch > 0 && scan.channels > 0 && scan.length > 0 && scan.states > 0 && scan.type >= MDNET_FLOAT32 &&
         scan.type <= MDNET_BFLOAT16;
}

// One pass over all tasks; the first status that is not MDNET_OK is kept.
struct Pass {
  const MdnetScan& scan;
  const MdnetScanGradients* gradients;  // null: the forward pass
  const MdnetKernel& kernel;
  std::atomic<int> status{MDNET_OK};

  int64_t tasks() const {
    return gradients ? scan.batch * mdnet_scan_splits(scan.channels) : kernel.forward_tasks(scan);
  }

  void run(int64_t task) {
    const int result = gradients ? kernel.backward(scan, *gradients, task) : kernel.forward(scan, task);
    int ok = MDNET_OK;
    if (result != MDNET_OK) status.compare_exchange_strong(ok, result);
  }
};

int run(const MdnetScan* scan, const MdnetScanGradients* gradients, MdnetParallelFor parallel_for, void* host) {
  if (!scan || !sensible(*scan) || (gradients && scan->type > MDNET_FLOAT64)) return MDNET_BAD_ARGUMENT;
  const MdnetKernel* kernel = build_for(scan->isa, kBuilds);
  if (!kernel) return MDNET_NO_ISA;
  Pass pass{*scan, gradients, *kernel};
  parallel_for(
      host, [](void* pass, size_t i) { static_cast<Pass*>(pass)->run(int64_t(i)); }, &pass, size_t(pass.tasks()));
  return pass.status;
}

// GNU's OpenMP runtime: run `function` on `threads` threads at once and wait for all.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

struct OpenMp {
  GompParallel parallel;
  int threads;

  struct Loop {
    void (*task)(void*, size_t);
    void* argument;
    size_t count;
    std::atomic<size_t> next{0};
  };

  static void work(void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    // Relaxed: tasks share nothing, and are ordered by the team's start and end.
    for (size_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count;) loop.task(loop.argument, i);
  }

  static void parallel_for(void* host, void (*task)(void*, size_t), void* argument, size_t count) {
    const OpenMp& self = *static_cast<const OpenMp*>(host);
    Loop loop{task, argument, count};
    if (!self.parallel || self.threads < 2 || count < 2) return work(&loop);
    // All of them, even for fewer tasks: libgomp ends the threads that a smaller team leaves over, and the host's next
    // operation would start them again.
    self.parallel(work, &loop, unsigned(self.threads), 0);
  }
};

}  // namespace

extern "C" {

int64_t mdnet_scan_splits(int64_t channels) { return (channels + kSplitChannels - 1) / kSplitChannels; }

int mdnet_scan(const MdnetScan* scan, MdnetParallelFor parallel_for, void* host) {
  return run(scan, nullptr, parallel_for, host);
}

int mdnet_scan_openmp(const MdnetScan* scan, const MdnetScanGradients* gradients, void* gomp_parallel, int threads) {
  OpenMp host{reinterpret_cast<GompParallel>(gomp_parallel), threads};
  return run(scan, gradients, OpenMp::parallel_for, &host);
}

}  // extern "C"
