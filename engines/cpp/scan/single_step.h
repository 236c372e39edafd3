// A sequence of one step, as a decoder has it: the state is read and written once, where it lies.
#pragma once

#include "scan/channel_group.h"

namespace MDNET_NAMESPACE {
namespace {

// Rows first, first + 1, ..., at their only step; those from `count` on are 0.
template <typename T, typename IO>
Vector<T> step_of(const MdnetRows& rows, int64_t image, int64_t first, int64_t count) {
  const IO* from = row<IO>(rows, image, first);
  if (rows.row_stride == 1) return read<T>(from, count);
  Vector<T> value{};
  for (int i = 0; i < kWidth<T> && i < count; ++i) value[i] = widen(from[i * rows.row_stride]);
  return value;
}

// The operations of ChannelGroup in the same order, so that a sequence that comes in steps has the result of the whole,
// bit for bit. Here the lanes of h are states, which is how it lies in memory; only for the sum over the states, which
// has an order, they become channels.
template <typename T, typename IO>
void single_step(const MdnetScan& scan, const Lanes& task) {
  using V = Vector<T>;
  constexpr int W = kWidth<T>;
  const int64_t first = task.first, lanes = task.end - first, states = scan.states, mix = task.group * states;
  const int64_t before = (task.image * scan.channels + first) * states;  // the first channel's place in h0 and h_last
  const T* A = static_cast<const T*>(scan.A) + first * states;
  const T* h0 = scan.h0 ? static_cast<const T*>(scan.h0) + before : nullptr;
  T* h_last = scan.h_last ? static_cast<T*>(scan.h_last) + before : nullptr;

  V step = step_of<T, IO>(scan.delta, task.image, first, lanes);
  if (scan.delta_bias) step += read<T>(static_cast<const T*>(scan.delta_bias) + first, lanes);
  if (!scan.no_softplus) step = softplus<T>(step);
  const V u = step_of<T, IO>(scan.u, task.image, first, lanes);
  alignas(V) T dt[W], dtu[W];
  store(dt, step);
  store(dtu, step * u);
  V y{};
  for (int64_t n = 0; n < states; n += W) {
    const int64_t count = states - n;
    const V B = step_of<T, IO>(scan.B, task.image, mix + n, count),
            C = step_of<T, IO>(scan.C, task.image, mix + n, count);
    V h[W];
    for (int i = 0; i < W; ++i) {
      if (i >= lanes) {
        h[i] = V{};
        continue;
      }
      const V A2 = read<T>(A + i * states + n, count) * T(1.44269504088896340736);
      const V past = h0 ? read<T>(h0 + i * states + n, count) : V{};
      h[i] = next_state<false, T>(past, splat(dt[i]), A2, splat(dtu[i]), B);
      if (h_last) write<T>(h_last + i * states + n, h[i], count);
    }
    transpose(h);
    for (int j = 0; j < W && j < count; ++j) y = multiply_add<T>(h[j], splat(C[j]), y);
  }
  if (scan.D) y = multiply_add<T>(read<T>(static_cast<const T*>(scan.D) + first, lanes), u, y);
  if (scan.z.data) y *= silu<T>(step_of<T, IO>(scan.z, task.image, first, lanes));
  write<T>(static_cast<IO*>(scan.y) + task.image * scan.channels + first, y, lanes);
}

}  // namespace
}  // namespace MDNET_NAMESPACE
