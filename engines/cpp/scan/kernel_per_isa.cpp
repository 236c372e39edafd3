// Selective scan on the CPU, forward and backward. CMake compiles this file once per instruction set.
//
// The lanes of a vector are channels: they share B and C, and no step sums across lanes. A task takes one group of
// channels of one image through all steps, a tile of steps at a time, so that what it works on stays in the first-level
// cache. Rows of u, delta and z are read along time, which is how they lie in memory, and transposed in registers.
#include "scan/backward.h"
#include "scan/channel_group.h"
#include "scan/kernel.h"
#include "simd/builds.h"
#include "simd/flush_to_zero.h"

namespace MDNET_NAMESPACE {
namespace {

template <typename T, typename IO>
void write_y(ChannelGroup<T, IO>& g) {
  constexpr int W = kWidth<T>;
  for (int64_t t = 0; t < g.steps; t += W) {
    Vector<T> rows[W];
    for (int i = 0; i < W; ++i) rows[i] = g.y[t + i];
    transpose(rows);
    for (int i = 0; i < g.lanes; ++i) {
      IO* y = static_cast<IO*>(g.scan.y) + g.channel(i) * g.scan.length + g.start + t;
      write<T>(y, (rows[i] + g.skip(i) * g.u(i, t)) * silu<T>(g.z(i, t)), g.steps - t);
    }
  }
}

template <typename T, typename IO>
int forward_group(const MdnetScan& scan, int64_t task) {
  using G = ChannelGroup<T, IO>;
  const int64_t groups = ceil_div(scan.channels, G::W);
  Arena arena(G::bytes(scan.states));
  if (!arena) return MDNET_NO_MEMORY;
  G group(scan, task / groups, task % groups * G::W, arena);
  for (int64_t k = 0; k < group.tiles(); ++k) {
    group.load_tile(k);
    scan_tile(group);
    write_y(group);
  }
  return MDNET_OK;
}

int64_t forward_tasks(const MdnetScan& scan) {
  return scan.batch * ceil_div(scan.channels, scan.type == MDNET_FLOAT64 ? kWidth<double> : kWidth<float>);
}

int forward(const MdnetScan& scan, int64_t task) {
  [[maybe_unused]] const FlushToZero guard;
  switch (scan.type) {
    case MDNET_FLOAT32:
      return forward_group<float, float>(scan, task);
    case MDNET_FLOAT64:
      return forward_group<double, double>(scan, task);
    case MDNET_FLOAT16:
      return forward_group<float, Half>(scan, task);
    default:
      return forward_group<float, Bfloat>(scan, task);
  }
}

template <typename T>
int backward_split(const MdnetScan& scan, const MdnetScanGradients& out, int64_t task) {
  using G = ChannelGroup<T, T>;
  const int64_t tiles = ceil_div(scan.length, kTile);
  const int64_t splits = ceil_div(scan.channels, kSplitChannels);
  const int64_t image = task / splits, split = task % splits;
  const int64_t shared = scan.length * scan.states, part = (split * scan.batch + image) * shared;
  T *grad_B = static_cast<T*>(out.B) + part, *grad_C = static_cast<T*>(out.C) + part;
  for (int64_t i = 0; i < shared; ++i) grad_B[i] = grad_C[i] = 0;
  const int64_t end = smaller(scan.channels, (split + 1) * kSplitChannels);
  for (int64_t first = split * kSplitChannels; first < end; first += G::W) {
    Arena arena(G::bytes(scan.states) + Backward<T>::bytes(tiles, scan.states));
    if (!arena) return MDNET_NO_MEMORY;
    G group(scan, image, first, arena);
    Backward<T>(group, out, grad_B, grad_C, arena).run();
  }
  return MDNET_OK;
}

int backward(const MdnetScan& scan, const MdnetScanGradients& gradients, int64_t task) {
  [[maybe_unused]] const FlushToZero guard;
  return scan.type == MDNET_FLOAT64 ? backward_split<double>(scan, gradients, task)
                                    : backward_split<float>(scan, gradients, task);
}

}  // namespace
}  // namespace MDNET_NAMESPACE

extern const ScanKernel MDNET_THIS_BUILD(scan) = {MDNET_NAMESPACE::forward_tasks, MDNET_NAMESPACE::forward,
                                                  MDNET_NAMESPACE::backward};
