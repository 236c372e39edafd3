// The selective scan on the host's threads, by the kernel for this processor.
#include "scan/scan.h"

#include "common/arithmetic.h"
#include "common/openmp.h"
#include "scan/kernel.h"
#include "simd/builds.h"

MDNET_BUILDS(ScanKernel, scan);

namespace {

bool sensible(const MdnetScan& scan) {
  return scan.batch > 0 && scan.channels > 0 && scan.length > 0 && scan.states > 0 && scan.type >= MDNET_FLOAT32 &&
         scan.type <= MDNET_BFLOAT16 && scan.groups >= 0 && scan.channels % groups_of(scan) == 0;
}

// The backward pass where `gradients` is not null.
int run(const MdnetScan* scan, const MdnetScanGradients* gradients, const Host& host) {
  if (!scan || !sensible(*scan) || (gradients && scan->type > MDNET_FLOAT64)) return MDNET_BAD_ARGUMENT;
  const ScanKernel* kernel = build_for(scan->isa, scan_builds);
  if (!kernel) return MDNET_NO_ISA;
  const int64_t parts = groups_of(*scan) * mdnet_scan_splits(channels_of_a_group(*scan));
  const int64_t tasks = gradients ? scan->batch * parts : kernel->forward_tasks(*scan);
  return host.run_and_check(tasks, [&](int64_t task) {
    return gradients ? kernel->backward(*scan, *gradients, task) : kernel->forward(*scan, task);
  });
}

}  // namespace

extern "C" {

int64_t mdnet_scan_splits(int64_t channels_of_a_group) { return ceil_div(channels_of_a_group, kSplitChannels); }

int mdnet_scan(const MdnetScan* scan, MdnetParallelFor parallel_for, void* host) {
  return run(scan, nullptr, {parallel_for, host});
}

int mdnet_scan_openmp(const MdnetScan* scan, const MdnetScanGradients* gradients, void* gomp_parallel, int threads) {
  OpenMp openmp(reinterpret_cast<OpenMp::Parallel>(gomp_parallel), threads);
  return run(scan, gradients, openmp.host());
}

}  // extern "C"
