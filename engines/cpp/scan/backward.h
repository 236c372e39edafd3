// The backward pass of a group of channels.
#pragma once

#include "scan/channel_group.h"

namespace MDNET_NAMESPACE {
namespace {

constexpr int kPart = 16;  // steps; a tile is a multiple of it
constexpr int kPartsOfTile = kTile / kPart;

// A first sweep saves the state before each part of a tile, and what each step has from delta and u. The states within
// a part are computed again, a few at a time, so that they and their decays stay in the first-level cache.
template <typename T>
struct Backward {
  using V = Vector<T>;
  using G = ChannelGroup<T, T>;
  static constexpr int W = kWidth<T>;
  static constexpr int kBlock = W < 4 ? W : 4;  // states at a time

  G& g;
  const MdnetScanGradients& out;
  const int64_t states;
  T *grad_B, *grad_C;                   // [length][states], this task's part
  V* before;                            // [parts][states]
  V *dt, *dtu;                          // [tiles][kTile]
  T* slope;                             // [tiles][W][kTile]: the derivative of softplus
  bool bounded = true;                  // in every tile
  int64_t tile = 0;                     // in the order of the scan
  int64_t asked = 0;                    // lanes of the next tile that were asked for
  V *decay, *state;                     // [kPart][kBlock]
  V *sums_B, *sums_C;                   // [kPart][blocks]: the lanes' terms, summed over some lanes
  V *carry, *grad_A;                    // [states]: dL/dh[t] from later steps; dL/dA
  V *grad_sum, *grad_dt, *grad_dtu;     // [kTile]
  T* gate;                              // [W][kTile]: the sigmoid of z
  V grad_D[W] = {}, grad_bias[W] = {};  // of each lane, terms of W steps side by side

  static int64_t blocks(int64_t states) { return ceil_div(states, W) * (W / kBlock); }

  static size_t bytes(int64_t tiles, int64_t states) {
    const int64_t vectors = tiles * kPartsOfTile * states + 2 * kPart * (kBlock + blocks(states)) + 2 * states;
    return (vectors + (3 + 2 * tiles) * kTile) * sizeof(V) + (1 + tiles) * W * kTile * sizeof(T) + 14 * kAlignment;
  }

  Backward(G& group, const MdnetScanGradients& out, T* grad_B, T* grad_C, Arena& arena)
      : g(group), out(out), states(g.scan.states), grad_B(grad_B), grad_C(grad_C) {
    before = arena.take<V>(g.tiles() * kPartsOfTile * states);
    dt = arena.take<V>(g.tiles() * kTile);
    dtu = arena.take<V>(g.tiles() * kTile);
    slope = arena.take<T>(g.tiles() * W * kTile);
    decay = arena.take<V>(kPart * kBlock);
    state = arena.take<V>(kPart * kBlock);
    sums_B = arena.take<V>(kPart * blocks(states));
    sums_C = arena.take<V>(kPart * blocks(states));
    carry = arena.take<V>(states);
    grad_A = arena.take<V>(states);
    grad_sum = arena.take<V>(kTile);
    grad_dt = arena.take<V>(kTile);
    grad_dtu = arena.take<V>(kTile);
    gate = arena.take<T>(W * kTile);
    for (int64_t n = 0; n < states; ++n) grad_A[n] = V{};
    for (int64_t i = 0; i < kPart * blocks(states); ++i) sums_B[i] = sums_C[i] = V{};
    g.read_states(out.h_last, carry);
  }

  void run() {
    const int64_t last = g.tiles() - 1;
    for (int64_t k = 0; k <= last; ++k) {
      choose_tile(k);
      g.prefetch(k + 1, {g.scan.u, g.scan.delta});
      if (g.scan.no_softplus) {
        g.load_tile(k, [](int, int64_t, V) {});
      } else {
        g.load_tile(k, [this](int i, int64_t t, V delta) { store(slope_of(i) + t, softplus_slope<T>(delta)); });
      }
      bounded &= g.bounded;
      for (int64_t part = 0; part < parts(); ++part) {
        save_state(k, part);
        if (k < last || part < parts() - 1) scan_steps<false>(g, steps_of_part(part));
      }
    }
    for (int64_t k = last; k >= 0; --k) {
      choose_tile(k);
      g.go_to_tile(k);
      load_gradients();
      for (int64_t part = parts() - 1; part >= 0; --part) {
        bounded ? propagate<true>(k, part) : propagate<false>(k, part);
        add_sums(part);
      }
      write_rows();
    }
    write_parameters();
    g.write_states(carry, out.h0);
  }

  void choose_tile(int64_t k) {
    tile = k;
    asked = 0;
    g.dt = dt + k * kTile;
    g.dtu = dtu + k * kTile;
  }
  T* slope_of(int i) const { return slope + (tile * W + i) * kTile; }

  // The tile's parts, in the order of the scan.
  int64_t parts() const { return ceil_div(g.steps, kPart); }
  Order steps_of_part(int64_t part) const {
    const int64_t position = g.scan.reverse ? parts() - 1 - part : part;
    return order_of(g, position * kPart, smaller(kPart, g.steps - position * kPart));
  }
  V* before_part(int64_t k, int64_t part) const { return before + (k * kPartsOfTile + part) * states; }

  void save_state(int64_t k, int64_t part) {
    for (int64_t n = 0; n < states; ++n) before_part(k, part)[n] = g.h[n];
  }

  V grad_y(int i, int64_t t) const { return g.steps_of(out.grad, i, t); }

  // The gradient of the ungated output, transposed.
  void load_gradients() {
    for (int64_t t = 0; t < g.steps; t += W) {
      V rows[W];
      for (int i = 0; i < W; ++i) {
        rows[i] = i < g.lanes ? grad_y(i, t) : V{};
        if (i >= g.lanes || !g.gated()) continue;
        const V z = g.z(i, t), opened = sigmoid<T>(z);
        store(gate + i * kTile + t, opened);
        rows[i] *= z * opened;
      }
      transpose(rows);
      for (int i = 0; i < W; ++i) {
        grad_sum[t + i] = rows[i];
        grad_dt[t + i] = grad_dtu[t + i] = V{};
      }
    }
  }

  template <bool Bounded>
  void propagate(int64_t k, int64_t part) {
    const Order order = steps_of_part(part);
    const V* h = before_part(k, part);
    for (int64_t n = 0; n < states; n += kBlock) {
      // A lane at a time: all at once would be more than can be under way.
      if (asked < g.lanes) {
        g.prefetch_lane(k - 1, asked++,
                        {g.scan.u, g.scan.z, out.grad, rows_of(out.u), rows_of(out.delta), rows_of(out.z)});
      }
      propagate_some<Bounded>(order, h, n, smaller(kBlock, states - n));
    }
  }

  template <bool Bounded, int Count = kBlock>
  void propagate_some(const Order& order, const V* h, int64_t n, int64_t count) {
    if constexpr (Count > 1) {
      if (count < Count) return propagate_some<Bounded, Count - 1>(order, h, n, count);
    }
    recompute<Bounded>(order, h + n, n, std::make_index_sequence<Count>{});
    propagate_block(order, h + n, n, std::make_index_sequence<Count>{});
  }

  // The states n, n + 1, ... of a part, and their decays, from the states `h` before it.
  template <bool Bounded, size_t... I>
  void recompute(const Order& order, const V* before, int64_t n, std::index_sequence<I...>) {
    V h[] = {before[I]...};
    const V A2[] = {g.A2[n + I]...};
    const T *B = g.B + n * kTile, *C = g.C + n * kTile;
    V *a = decay, *now = state;
    int64_t t = order.begin;
    for (int64_t step = 0; step < order.count; ++step, t += order.step, a += kBlock, now += kBlock) {
      const V dt = g.dt[t], dtu = g.dtu[t];
      V sum = g.y[t];
      ((a[I] = exp2_product<Bounded, T>(dt, A2[I]),
        now[I] = h[I] = multiply_add<T>(a[I], h[I], dtu * splat(B[I * kTile + t])),
        sum = multiply_add<T>(h[I], splat(C[I * kTile + t]), sum)),
       ...);
      g.y[t] = sum;
    }
  }

  // Against the order of the scan: dL/dh[t] = grad_sum[t] C[t] + decay[t+1] dL/dh[t+1].
  template <size_t... I>
  void propagate_block(const Order& order, const V* before, int64_t n, std::index_sequence<I...>) {
    V later[] = {carry[n + I]...}, sum_A[] = {grad_A[n + I]...};
    const V A2[] = {g.A2[n + I]...};
    const T *B = g.B + n * kTile, *C = g.C + n * kTile;
    const V *a = decay + order.count * kBlock, *now = state + order.count * kBlock;
    int64_t t = order.begin + order.count * order.step;
    for (int64_t step = order.count - 1; step >= 0; --step) {
      t -= order.step;
      a -= kBlock;
      now -= kBlock;
      const V* h = step ? now - kBlock : before;
      const V dt = g.dt[t], dtu = g.dtu[t], grad = grad_sum[t];
      V sum_dt = grad_dt[t], sum_dtu = grad_dtu[t], terms_B[kBlock] = {}, terms_C[kBlock] = {};
      V grad_h, grad_exponent;  // of dt A
      ((grad_h = multiply_add<T>(grad, splat(C[I * kTile + t]), later[I]), later[I] = grad_h * a[I],
        grad_exponent = later[I] * h[I], sum_A[I] = multiply_add<T>(grad_exponent, dt, sum_A[I]),
        sum_dt = multiply_add<T>(grad_exponent, A2[I], sum_dt),
        sum_dtu = multiply_add<T>(grad_h, splat(B[I * kTile + t]), sum_dtu), terms_B[I] = grad_h * dtu,
        terms_C[I] = grad * now[I]),
       ...);
      grad_dt[t] = sum_dt;
      grad_dtu[t] = sum_dtu;
      sum_stages<1, kBlock>(terms_B);
      sum_stages<1, kBlock>(terms_C);
      const int64_t place = t % kPart * blocks(states) + n / kBlock;
      sums_B[place] = terms_B[0];
      sums_C[place] = terms_C[0];
    }
    ((carry[n + I] = later[I], grad_A[n + I] = sum_A[I]), ...);
  }

  // Add a part's terms of the gradients of B and C.
  void add_sums(int64_t part) {
    const Order order = steps_of_part(part);
    const int64_t row = blocks(states), first = order.step > 0 ? order.begin : order.begin - order.count + 1;
    for (int64_t t = 0; t < order.count; ++t) {
      for (int64_t n = 0; n < states; n += W) {
        const int64_t from = t * row + n / kBlock, to = (g.start + first + t) * states + n;
        add(grad_B + to, states - n, sums_B + from);
        add(grad_C + to, states - n, sums_C + from);
      }
    }
  }

  static void add(T* to, int64_t count, const V* partial) {
    V sums[W / kBlock];
    for (int i = 0; i < W / kBlock; ++i) sums[i] = partial[i];
    sum_stages<kBlock, W>(sums);
    write<T>(to, read<T>(to, count) + sums[0], count);
  }

  // The gradients of u, delta and z, transposed back to rows along time.
  void write_rows() {
    for (int64_t t = 0; t < g.steps; t += W) {
      V sums[W], steps[W], dts[W], dtus[W];
      for (int i = 0; i < W; ++i) {
        sums[i] = g.y[t + i];
        steps[i] = g.dt[t + i];
        dts[i] = grad_dt[t + i] * T(0.69314718055994530942);  // A2 is A log2(e)
        dtus[i] = grad_dtu[t + i];
      }
      transpose(sums);
      transpose(steps);
      transpose(dts);
      transpose(dtus);
      const int64_t count = g.steps - t;
      for (int i = 0; i < g.lanes; ++i) {
        const V u = g.u(i, t), grad = grad_y(i, t);
        V grad_row = grad, y = sums[i], grad_u = dtus[i] * steps[i], grad_delta = dts[i] + dtus[i] * u;
        if (g.skips()) y += g.skip(i) * u;
        if (g.gated()) {
          const V z = g.z(i, t), opened = load<V>(gate + i * kTile + t);
          write<T>(output(out.z, i) + t, grad * y * opened * (T(1) + z * (T(1) - opened)), count);
          grad_row *= z * opened;
        }
        if (g.skips()) grad_u += grad_row * g.skip(i);
        if (!g.scan.no_softplus) grad_delta *= load<V>(slope_of(i) + t);
        write<T>(output(out.u, i) + t, grad_u, count);
        write<T>(output(out.delta, i) + t, grad_delta, count);
        grad_D[i] += grad_row * u;
        grad_bias[i] += grad_delta;
      }
    }
  }

  MdnetRows rows_of(void* rows) const { return {rows, g.scan.channels * g.scan.length, g.scan.length}; }
  T* output(void* rows, int i) const { return static_cast<T*>(rows) + g.channel(i) * g.scan.length + g.start; }

  void write_parameters() {
    const V sum_D = sum_lanes(grad_D), sum_bias = sum_lanes(grad_bias);
    const int64_t channel = g.channel(0);
    if (g.skips()) write<T>(static_cast<T*>(out.D) + channel, sum_D, g.lanes);
    if (g.scan.delta_bias) write<T>(static_cast<T*>(out.delta_bias) + channel, sum_bias, g.lanes);
    g.write_states(grad_A, out.A);
  }
};

}  // namespace
}  // namespace MDNET_NAMESPACE
