// The backward pass of a group of channels.
#pragma once

#include "scan/channel_group.h"

namespace MDNET_NAMESPACE {
namespace {

// The state before each tile is saved; the states within a tile are computed again.
template <typename T>
struct Backward {
  using V = Vector<T>;
  using G = ChannelGroup<T, T>;
  static constexpr int W = kWidth<T>;

  G& g;
  const MdnetScanGradients& out;
  const int64_t states;
  T *grad_B, *grad_C;                // [length][states], this task's part
  V* before;                         // [tiles][states]
  V *decay, *state;                  // [kTile][states]
  V *carry, *grad_A;                 // [states]: dL/dh[t] from later steps; dL/dA
  V *grad_sum, *grad_dt, *grad_dtu;  // [kTile]
  T grad_D[W] = {}, grad_bias[W] = {};

  static size_t bytes(int64_t tiles, int64_t states) {
    return (tiles * states + 2 * kTile * states + 2 * states + 3 * kTile) * sizeof(V) + 8 * kAlignment;
  }

  Backward(G& group, const MdnetScanGradients& out, T* grad_B, T* grad_C, Arena& arena)
      : g(group), out(out), states(g.scan.states), grad_B(grad_B), grad_C(grad_C) {
    before = arena.take<V>(g.tiles() * states);
    decay = arena.take<V>(kTile * states);
    state = arena.take<V>(kTile * states);
    carry = arena.take<V>(states);
    grad_A = arena.take<V>(states);
    grad_sum = arena.take<V>(kTile);
    grad_dt = arena.take<V>(kTile);
    grad_dtu = arena.take<V>(kTile);
    for (int64_t n = 0; n < states; ++n) grad_A[n] = V{};
    g.read_states(out.h_last, carry);
  }

  void run() {
    const int64_t last = g.tiles() - 1;
    for (int64_t k = 0; k < last; ++k) {
      save_state(k);
      g.load_tile(k);
      scan_tile(g);
    }
    save_state(last);
    for (int64_t k = last; k >= 0; --k) {
      g.load_tile(k);
      load_gradients();
      g.bounded ? recompute<true>(k) : recompute<false>(k);
      propagate(k);
      write_rows();
    }
    write_parameters();
    g.write_states(carry, out.h0);
  }

  void save_state(int64_t k) {
    for (int64_t n = 0; n < states; ++n) before[k * states + n] = g.h[n];
  }

  V grad_y(int i, int64_t t) const { return g.steps_of(out.grad, i, t); }

  V grad_ungated(int i, int64_t t) const { return g.gated() ? grad_y(i, t) * silu<T>(g.z(i, t)) : grad_y(i, t); }

  // The gradient of the ungated output, transposed.
  void load_gradients() {
    for (int64_t t = 0; t < g.steps; t += W) {
      V rows[W];
      for (int i = 0; i < W; ++i) rows[i] = i < g.lanes ? grad_ungated(i, t) : V{};
      transpose(rows);
      for (int i = 0; i < W; ++i) {
        grad_sum[t + i] = rows[i];
        grad_dt[t + i] = grad_dtu[t + i] = V{};
      }
    }
  }

  template <bool Bounded>
  void recompute(int64_t k) {
    const V* h = before + k * states;
    const Order order = order_of(g);
    int64_t t = order.begin;
    for (int64_t count = 0; count < order.count; ++count, t += order.step) {
      V *a = decay + t * states, *now = state + t * states;
      V sum{};
      for (int64_t n = 0; n < states; ++n) {
        a[n] = exp2_product<Bounded, T>(g.dt[t], g.A2[n]);
        now[n] = a[n] * h[n] + g.dtu[t] * g.B[n * kTile + t];
        sum += now[n] * g.C[n * kTile + t];
      }
      g.y[t] = sum;
      h = now;
    }
  }

  // Against the order of the scan: dL/dh[t] = grad_sum[t] C[t] + decay[t+1] dL/dh[t+1].
  void propagate(int64_t k) {
    const Order order = order_of(g);
    int64_t t = order.begin + (order.count - 1) * order.step;
    for (int64_t count = order.count - 1; count >= 0; --count, t -= order.step) {
      const V *a = decay + t * states, *now = state + t * states;
      const V* h = count ? state + (t - order.step) * states : before + k * states;
      const V dt = g.dt[t], dtu = g.dtu[t], grad = grad_sum[t];
      V sum_dt{}, sum_dtu{};
      for (int64_t n = 0; n < states; n += W) {
        V rows_B[W] = {}, rows_C[W] = {};
        const int count = int(smaller(W, states - n));
        for (int i = 0; i < count; ++i) {
          const V grad_h = grad * g.C[(n + i) * kTile + t] + carry[n + i];
          carry[n + i] = grad_h * a[n + i];
          const V grad_exponent = carry[n + i] * h[n + i];  // of dt A
          grad_A[n + i] += grad_exponent * dt;
          sum_dt += grad_exponent * g.A2[n + i];
          sum_dtu += grad_h * g.B[(n + i) * kTile + t];
          rows_B[i] = grad_h * dtu;
          rows_C[i] = grad * now[n + i];
        }
        add(grad_B, n, t, sum_lanes(rows_B));
        add(grad_C, n, t, sum_lanes(rows_C));
      }
      grad_dt[t] = sum_dt * T(0.69314718055994530942);  // A2 is A log2(e)
      grad_dtu[t] = sum_dtu;
    }
  }

  void add(T* sums, int64_t n, int64_t t, V value) {
    T* to = sums + (g.start + t) * states + n;
    const int64_t count = states - n;
    write<T>(to, read<T>(to, count) + value, count);
  }

  // The gradients of u, delta and z, transposed back to rows along time.
  void write_rows() {
    for (int64_t t = 0; t < g.steps; t += W) {
      V sums[W], dts[W], dtus[W];
      for (int i = 0; i < W; ++i) {
        sums[i] = g.y[t + i];
        dts[i] = grad_dt[t + i];
        dtus[i] = grad_dtu[t + i];
      }
      transpose(sums);
      transpose(dts);
      transpose(dtus);
      const int64_t count = g.steps - t;
      for (int i = 0; i < g.lanes; ++i) {
        const V u = g.u(i, t), delta = g.biased_delta(i, t);
        const V grad_sum_row = grad_ungated(i, t);
        V y = sums[i], skipped{}, grad_delta = dts[i] + dtus[i] * u;
        if (g.skips()) {
          y += g.skip(i) * u;
          skipped = grad_sum_row * g.skip(i);
        }
        if (g.gated()) {
          const V z = g.z(i, t), gate = sigmoid<T>(z);
          write<T>(output(out.z, i) + t, grad_y(i, t) * y * gate * (T(1) + z * (T(1) - gate)), count);
        }
        if (!g.scan.no_softplus) grad_delta = grad_delta * sigmoid<T>(delta);  // the derivative of softplus
        write<T>(output(out.u, i) + t, multiply_add<T>(dtus[i], g.step_size(delta), skipped), count);
        write<T>(output(out.delta, i) + t, grad_delta, count);
        const V grad_skip = grad_sum_row * u;
        for (int64_t j = 0; j < W && j < count; ++j) {
          grad_D[i] += grad_skip[j];
          grad_bias[i] += grad_delta[j];
        }
      }
    }
  }

  T* output(void* rows, int i) const { return static_cast<T*>(rows) + g.channel(i) * g.scan.length + g.start; }

  void write_parameters() {
    for (int i = 0; i < g.lanes; ++i) {
      const int64_t channel = g.channel(i);
      if (g.skips()) static_cast<T*>(out.D)[channel] = grad_D[i];
      if (g.scan.delta_bias) static_cast<T*>(out.delta_bias)[channel] = grad_bias[i];
      for (int64_t n = 0; n < states; ++n) {
        static_cast<T*>(out.A)[channel * states + n] = grad_A[n][i];
      }
    }
  }
};

}  // namespace
}  // namespace MDNET_NAMESPACE
