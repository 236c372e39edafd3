// What forward and backward pass share: a group of channels, and the scan of a tile of its steps.
#pragma once

#include <initializer_list>

#include "common/arena.h"
#include "common/arithmetic.h"
#include "scan/kernel.h"
#include "simd/math.h"
#include "simd/transpose.h"

namespace MDNET_NAMESPACE {
namespace {

constexpr int kTile = 64;  // steps; a multiple of every width

template <typename IO>
const IO* row(const MdnetRows& rows, int64_t image, int64_t index) {
  return static_cast<const IO*>(rows.data) + image * rows.batch_stride + index * rows.row_stride;
}

// What a task works on: channels that share B and C, kWidth of them or fewer.
struct Lanes {
  int64_t image, group;  // of B and C
  int64_t first, end;    // channels; those after `end` are for other tasks
  static Lanes of(const MdnetScan& scan, int64_t image, int64_t group, int64_t first, int64_t width) {
    const int64_t of_group = channels_of_a_group(scan), start = group * of_group + first;
    return {image, group, start, smaller(start + width, (group + 1) * of_group)};
  }
};

// W columns of W rows that lie side by side in memory, transposed: vector i has what the lanes have in column n + i.
template <typename T>
void read_columns(const T* rows, int64_t stride, int64_t lanes, int64_t n, Vector<T> (&columns)[kWidth<T>]) {
  for (int i = 0; i < kWidth<T>; ++i) {
    columns[i] = i < lanes ? read<T>(rows + i * stride + n, stride - n) : Vector<T>{};
  }
  transpose(columns);
}

template <typename T>
void write_columns(T* rows, int64_t stride, int64_t lanes, int64_t n, Vector<T> (&columns)[kWidth<T>]) {
  transpose(columns);
  for (int i = 0; i < lanes; ++i) write<T>(rows + i * stride + n, columns[i], stride - n);
}

// The channels of one task, and the tile that the scan has reached.
template <typename T, typename IO>
struct ChannelGroup {
  using Scalar = T;
  using V = Vector<T>;
  static constexpr int W = kWidth<T>;

  const MdnetScan& scan;
  int64_t image, first, lanes;   // lanes in use; the others hold zeros
  int64_t mix;                   // the first row of B and C
  int64_t start = 0, steps = 0;  // the current tile
  bool bounded = true;           // |dt A log2(e)| stays below 2^21 in the current tile
  T steepest[W];                 // per lane: the largest |A log2(e)|

  V *A2, *h;        // [states]: A log2(e); the state
  V *dt, *dtu, *y;  // [kTile]
  T *B, *C;         // [states][kTile]

  static size_t bytes(int64_t states) {
    return (2 * states + 3 * kTile) * sizeof(V) + 2 * states * kTile * sizeof(T) + 7 * kAlignment;
  }

  ChannelGroup(const MdnetScan& scan, const Lanes& task, Arena& arena)
      : scan(scan), image(task.image), first(task.first), lanes(task.end - task.first), mix(task.group * scan.states) {
    const int64_t states = scan.states;
    A2 = arena.take<V>(states);
    h = arena.take<V>(states);
    dt = arena.take<V>(kTile);
    dtu = arena.take<V>(kTile);
    y = arena.take<V>(kTile);
    B = arena.take<T>(states * kTile);
    C = arena.take<T>(states * kTile);
    const T* A = static_cast<const T*>(scan.A) + first * states;
    V steep{};
    for (int64_t n = 0; n < states; n += W) {
      V columns[W];
      read_columns(A, states, lanes, n, columns);
      for (int64_t j = 0; j < W && n + j < states; ++j) {
        A2[n + j] = columns[j] * T(1.44269504088896340736);
        const V magnitude = at_least(A2[n + j], -A2[n + j]);
        steep = (steep >= magnitude) | (steep != steep) ? steep : magnitude;  // a NaN stays: nothing is bounded
      }
    }
    store(steepest, steep);
    read_states(scan.h0, h);
  }

  // States of the group, [states], from and to the layout of h0; zeros if there is none.
  void read_states(const void* from, V* to) const {
    const int64_t states = scan.states;
    for (int64_t n = 0; n < states; n += W) {
      V columns[W] = {};
      if (from) read_columns(static_cast<const T*>(from) + channel(0) * states, states, lanes, n, columns);
      for (int64_t j = 0; j < W && n + j < states; ++j) to[n + j] = columns[j];
    }
  }
  void write_states(const V* from, void* to) const {
    const int64_t states = scan.states;
    if (!to) return;
    for (int64_t n = 0; n < states; n += W) {
      V columns[W] = {};
      for (int64_t j = 0; j < W && n + j < states; ++j) columns[j] = from[n + j];
      write_columns(static_cast<T*>(to) + channel(0) * states, states, lanes, n, columns);
    }
  }

  // The channel of lane `i`, counted over all images: the index of its row in a contiguous output.
  int64_t channel(int64_t i) const { return image * scan.channels + first + i; }
  int64_t tiles() const { return ceil_div(scan.length, kTile); }
  int64_t start_of(int64_t k) const { return (scan.reverse ? tiles() - 1 - k : k) * kTile; }

  // Go to tile `k`, counted in the order of the scan: read B and C, and compute what depends on u and delta alone.
  // `look(i, t, delta)` sees each lane's steps from t on, with its bias.
  template <typename Look>
  void load_tile(int64_t k, const Look& look) {
    go_to_tile(k);
    V exponents{};  // a sum, at least the largest |dt A log2(e)|: one instruction, and far below the limit
    for (int64_t t = 0; t < steps; t += W) {
      V step[W], added[W];
      for (int i = 0; i < W; ++i) {
        if (i >= lanes) {
          step[i] = added[i] = V{};
          continue;
        }
        const V delta = biased_delta(i, t);
        look(i, t, delta);
        step[i] = step_size(delta);
        added[i] = step[i] * u(i, t);
        exponents += (scan.no_softplus ? at_least(step[i], -step[i]) : step[i]) * steepest[i];
      }
      transpose(step);
      transpose(added);
      for (int i = 0; i < W; ++i) {
        dt[t + i] = step[i];
        dtu[t + i] = added[i];
      }
    }
    bounded = true;
    for (int j = 0; j < W; ++j) bounded &= exponents[j] < T(1 << 21);
  }

  // Go to tile `k`: its steps, B and C, and a y of zeros.
  void go_to_tile(int64_t k) {
    start = start_of(k);
    steps = smaller(kTile, scan.length - start);
    for (int64_t n = 0; n < scan.states; ++n) {
      const IO *b = row<IO>(scan.B, image, mix + n) + start, *c = row<IO>(scan.C, image, mix + n) + start;
      for (int64_t t = 0; t < steps; t += W) {
        store(B + n * kTile + t, read<T>(b + t, steps - t));
        store(C + n * kTile + t, read<T>(c + t, steps - t));
      }
    }
    for (int64_t t = 0; t < steps; ++t) y[t] = V{};
  }

  // Ask for what tile `k` will read: so many short pieces of rows are more than hardware foresees.
  __attribute__((always_inline)) void prefetch(int64_t k, std::initializer_list<MdnetRows> all) const {
    for (int64_t i = 0; i < lanes; ++i) prefetch_lane(k, i, all);
  }

  // Always inline: GCC takes a function that only asks for one without effect, and drops the call.
  __attribute__((always_inline)) void prefetch_lane(int64_t k, int64_t i, std::initializer_list<MdnetRows> all) const {
    if (k < 0 || k >= tiles()) return;
    for (const MdnetRows& rows : all) {
      if (!rows.data) continue;
      const IO* from = row<IO>(rows, image, first + i) + start_of(k);
      for (int64_t t = 0; t < kTile; t += 64 / sizeof(IO)) __builtin_prefetch(from + t);
    }
  }

  // W steps of lane `i`, from step `t` of the tile on.
  V u(int i, int64_t t) const { return steps_of(scan.u, i, t); }
  V z(int i, int64_t t) const { return steps_of(scan.z, i, t); }
  V biased_delta(int i, int64_t t) const {
    const V delta = steps_of(scan.delta, i, t);
    return scan.delta_bias ? delta + static_cast<const T*>(scan.delta_bias)[first + i] : delta;
  }
  V step_size(V biased_delta) const { return scan.no_softplus ? biased_delta : softplus<T>(biased_delta); }
  bool gated() const { return scan.z.data; }
  bool skips() const { return scan.D; }
  T skip(int i) const { return static_cast<const T*>(scan.D)[first + i]; }
  V steps_of(const MdnetRows& rows, int i, int64_t t) const {
    return read<T>(row<IO>(rows, image, first + i) + start + t, steps - t);
  }
};

// Steps of a tile in the order of the scan: `step` is 1 or -1.
struct Order {
  int64_t begin, step, count;
};

template <typename G>
Order order_of(const G& group, int64_t first, int64_t count) {
  return group.scan.reverse ? Order{first + count - 1, -1, count} : Order{first, 1, count};
}

template <bool Bounded, typename T>
Vector<T> next_state(Vector<T> h, Vector<T> dt, Vector<T> A2, Vector<T> dtu, Vector<T> B) {
  return multiply_add<T>(exp2_product<Bounded, T>(dt, A2), h, dtu * B);
}

// Take the states n, n + 1, ... through steps of the tile; y where `Sums`. Unrolled, so that they stay in registers.
template <bool Sums, bool Bounded, typename G, size_t... I>
void scan_states(G& g, const Order& order, int64_t n, std::index_sequence<I...>) {
  using T = typename G::Scalar;
  Vector<T> h[sizeof...(I)] = {g.h[n + I]...};
  const Vector<T>* A2 = g.A2 + n;
  const T *B = g.B + n * kTile, *C = g.C + n * kTile;
  int64_t t = order.begin;
  for (int64_t count = 0; count < order.count; ++count, t += order.step) {
    const Vector<T> dt = g.dt[t], dtu = g.dtu[t];
    Vector<T> sum = g.y[t];
    ((h[I] = next_state<Bounded, T>(h[I], dt, A2[I], dtu, splat(B[I * kTile + t])),
      sum = Sums ? multiply_add<T>(h[I], splat(C[I * kTile + t]), sum) : sum),
     ...);
    if (Sums) g.y[t] = sum;
  }
  ((g.h[n + I] = h[I]), ...);
}

template <bool Sums, bool Bounded, typename G>
void scan_steps(G& g, const Order& order) {
  int64_t n = 0;
  const int64_t states = g.scan.states;
  for (; n + 16 <= states; n += 16) scan_states<Sums, Bounded>(g, order, n, std::make_index_sequence<16>{});
  for (; n + 4 <= states; n += 4) scan_states<Sums, Bounded>(g, order, n, std::make_index_sequence<4>{});
  for (; n < states; ++n) scan_states<Sums, Bounded>(g, order, n, std::make_index_sequence<1>{});
}

template <bool Sums, typename G>
void scan_steps(G& g, const Order& order) {
  g.bounded ? scan_steps<Sums, true>(g, order) : scan_steps<Sums, false>(g, order);
}

}  // namespace
}  // namespace MDNET_NAMESPACE
