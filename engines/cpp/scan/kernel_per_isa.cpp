// Selective scan on the CPU, forward and backward. CMake compiles this file once per instruction set.
//
// The lanes of a vector are channels: they share B and C, and no step sums across lanes. A task takes one group of
// channels of one image through all steps, a tile of steps at a time, so that what it works on stays in the first-level
// cache. Rows of u, delta and z are read along time, which is how they lie in memory, and transposed in registers.
#include "scan/backward.h"
#include "scan/channel_group.h"
#include "scan/kernel.h"
#include "scan/single_step.h"
#include "simd/builds.h"
#include "simd/flush_to_zero.h"

namespace MDNET_NAMESPACE {
namespace {

constexpr size_t kLocalBytes = 32 << 10;  // on the stack: enough for 20 states and for most models
// The work of a vector of channels in one step is its states and about eight more for softplus, the gate and y; below
// some 10 microseconds of it a second task saves little, and waits for milliseconds where the other cores are busy.
constexpr int64_t kWorkOfStep = 8, kWorkOfTask = 1 << 11;

template <typename T, typename IO>
void write_y(ChannelGroup<T, IO>& g) {
  constexpr int W = kWidth<T>;
  for (int64_t t = 0; t < g.steps; t += W) {
    Vector<T> rows[W];
    for (int i = 0; i < W; ++i) rows[i] = g.y[t + i];
    transpose(rows);
    for (int i = 0; i < g.lanes; ++i) {
      IO* y = static_cast<IO*>(g.scan.y) + g.channel(i) * g.scan.length + g.start + t;
      Vector<T> value = rows[i];
      if (g.skips()) value = multiply_add<T>(splat(g.skip(i)), g.u(i, t), value);
      if (g.gated()) value *= silu<T>(g.z(i, t));
      write<T>(y, value, g.steps - t);
    }
  }
}

template <typename T, typename IO>
int forward_lanes(const MdnetScan& scan, const Lanes& task) {
  using G = ChannelGroup<T, IO>;
  if (scan.length == 1) return single_step<T, IO>(scan, task), MDNET_OK;
  LocalArena<kLocalBytes> arena(G::bytes(scan.states));
  if (!arena) return MDNET_NO_MEMORY;
  G group(scan, task, arena);
  for (int64_t k = 0; k < group.tiles(); ++k) {
    group.prefetch(k + 1, {scan.u, scan.delta, scan.z});
    group.load_tile(k, [](int, int64_t, Vector<T>) {});
    scan_steps<true>(group, order_of(group, 0, group.steps));
    write_y(group);
  }
  group.write_states(group.h, scan.h_last);
  return MDNET_OK;
}

// The forward pass, cut into tasks: each has some groups of channels of one image that share B and C.
struct Cut {
  int64_t width, of_task, tasks_of_group;  // channels of a vector, and of a task

  explicit Cut(const MdnetScan& scan) : width(scan.type == MDNET_FLOAT64 ? kWidth<double> : kWidth<float>) {
    const int64_t channels = channels_of_a_group(scan), vectors = ceil_div(channels, width);
    const int64_t work = scan.length * (scan.states + kWorkOfStep);  // of a vector
    of_task = ceil_div(vectors, larger(1, smaller(vectors, vectors * work / kWorkOfTask))) * width;
    tasks_of_group = ceil_div(channels, of_task);
  }
};

template <typename T, typename IO>
int forward_task(const MdnetScan& scan, int64_t task) {
  const Cut cut(scan);
  const int64_t part = task % cut.tasks_of_group, group = task / cut.tasks_of_group % groups_of(scan);
  const int64_t image = task / cut.tasks_of_group / groups_of(scan);
  const Lanes all = Lanes::of(scan, image, group, part * cut.of_task, cut.of_task);
  for (int64_t first = all.first; first < all.end; first += cut.width) {
    const Lanes some{image, group, first, smaller(first + cut.width, all.end)};
    if (const int status = forward_lanes<T, IO>(scan, some)) return status;
  }
  return MDNET_OK;
}

int64_t forward_tasks(const MdnetScan& scan) { return scan.batch * groups_of(scan) * Cut(scan).tasks_of_group; }

int forward(const MdnetScan& scan, int64_t task) {
  [[maybe_unused]] const FlushToZero guard;
  switch (scan.type) {
    case MDNET_FLOAT32:
      return forward_task<float, float>(scan, task);
    case MDNET_FLOAT64:
      return forward_task<double, double>(scan, task);
    case MDNET_FLOAT16:
      return forward_task<float, Half>(scan, task);
    default:
      return forward_task<float, Bfloat>(scan, task);
  }
}

template <typename T>
int backward_split(const MdnetScan& scan, const MdnetScanGradients& out, int64_t task) {
  using G = ChannelGroup<T, T>;
  const int64_t tiles = ceil_div(scan.length, kTile);
  const int64_t groups = groups_of(scan), splits = ceil_div(channels_of_a_group(scan), kSplitChannels);
  const int64_t split = task % splits, mix = task / splits % groups, image = task / splits / groups;
  const int64_t shared = scan.length * scan.states, part = ((split * scan.batch + image) * groups + mix) * shared;
  T *grad_B = static_cast<T*>(out.B) + part, *grad_C = static_cast<T*>(out.C) + part;
  for (int64_t i = 0; i < shared; ++i) grad_B[i] = grad_C[i] = 0;
  const Lanes all = Lanes::of(scan, image, mix, split * kSplitChannels, kSplitChannels);
  for (int64_t first = all.first; first < all.end; first += G::W) {
    Arena arena(G::bytes(scan.states) + Backward<T>::bytes(tiles, scan.states));
    if (!arena) return MDNET_NO_MEMORY;
    G group(scan, {image, mix, first, smaller(first + G::W, all.end)}, arena);
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
