// The residual sum and GEGLU on the host's threads.
#include "common/arithmetic.h"
#include "common/parallel.h"
#include "quantised/kernel.h"
#include "simd/builds.h"

MDNET_BUILDS(QuantisedKernel, quantised);

namespace {

constexpr int64_t kTask = 32768;  // elements of a task

}  // namespace

extern "C" {

int mdnet_residual_sum(const MdnetResidualSum* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || call->count <= 0) return MDNET_BAD_ARGUMENT;
  const QuantisedKernel* kernel = build_for(call->isa, quantised_builds);
  if (!kernel) return MDNET_NO_ISA;
  Host{parallel_for, host}.run(ceil_div(call->count, kTask), [&](int64_t task) {
    kernel->residual_sum(*call, task * kTask, smaller((task + 1) * kTask, call->count));
  });
  return MDNET_OK;
}

int mdnet_geglu(const MdnetGeglu* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || call->rows <= 0 || call->channels <= 0) return MDNET_BAD_ARGUMENT;
  const QuantisedKernel* kernel = build_for(call->isa, quantised_builds);
  if (!kernel) return MDNET_NO_ISA;
  const int64_t rows = larger(kTask / call->channels, 1);
  Host{parallel_for, host}.run(ceil_div(call->rows, rows), [&](int64_t task) {
    kernel->geglu(*call, task * rows, smaller((task + 1) * rows, call->rows));
  });
  return MDNET_OK;
}

}  // extern "C"
