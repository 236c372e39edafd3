// Selective scan on the CPU, forward and backward. CMake compiles this file once per instruction set.
//
// The lanes of a vector are channels: they share B and C, and no step sums across lanes. A task takes one group of
// channels of one image through all steps, a tile of steps at a time, so that what it works on stays in the first-level
// cache. Rows of u, delta and z are read along time, which is how they lie in memory, and transposed in registers.
#include <stdlib.h>

#include "kernel.h"
#include "vector.h"

namespace MDNET_NAMESPACE {
namespace {

constexpr int kTile = 64;  // steps; a multiple of every width
constexpr int kAlignment = 64;

// Memory for one task: sized first, then handed out piece by piece.
class Arena {
 public:
  explicit Arena(size_t bytes) : memory_(static_cast<char*>(aligned_alloc(kAlignment, up(bytes)))), next_(memory_) {}
  ~Arena() { free(memory_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  explicit operator bool() const { return memory_ != nullptr; }

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += up(count * sizeof(T));
    return piece;
  }

 private:
  static size_t up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
  char* memory_;
  char* next_;
};

// While one lives, results too small for a normal number are 0: a state that decays into subnormal numbers would slow
// x86 processors down twentyfold. Operands keep theirs (the caller may have it otherwise): float16 is read through
// them.
class FlushToZero {
 public:
#if defined(__x86_64__)
  FlushToZero() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr((before_ | 0x8000) & ~0x0040u); }
  ~FlushToZero() { __builtin_ia32_ldmxcsr(before_); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  const unsigned before_;
#endif
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename IO>
const IO* row(const MdnetRows& rows, int64_t image, int64_t index) {
  return static_cast<const IO*>(rows.data) + image * rows.batch_stride + index * rows.row_stride;
}

// The channels of one task, kWidth of them or fewer, and where the scan is: what forward and backward share.
template <typename T, typename IO>
struct Group {
  using Scalar = T;
  using V = Vector<T>;
  static constexpr int W = kWidth<T>;

  const MdnetScan& scan;
  int64_t image, first, lanes;   // lanes in use; the others hold zeros
  int64_t start = 0, steps = 0;  // the current tile
  bool bounded = true;           // |dt A log2(e)| stays below 2^21 in the current tile
  T steepest[W] = {};            // per lane: the largest |A log2(e)|

  V *A2, *h;        // [states]: A log2(e); the state
  V *dt, *dtu, *y;  // [kTile]
  T *B, *C;         // [states][kTile]

  static size_t bytes(int64_t states) {
    return (2 * states + 3 * kTile) * sizeof(V) + 2 * states * kTile * sizeof(T) + 7 * kAlignment;
  }

  Group(const MdnetScan& scan, int64_t image, int64_t first, Arena& arena)
      : scan(scan), image(image), first(first), lanes(smaller(W, scan.channels - first)) {
    const int64_t states = scan.states;
    A2 = arena.take<V>(states);
    h = arena.take<V>(states);
    dt = arena.take<V>(kTile);
    dtu = arena.take<V>(kTile);
    y = arena.take<V>(kTile);
    B = arena.take<T>(states * kTile);
    C = arena.take<T>(states * kTile);
    const T* A = static_cast<const T*>(scan.A) + first * scan.states;
    for (int64_t n = 0; n < states; ++n) {
      A2[n] = h[n] = V{};
      for (int64_t i = 0; i < lanes; ++i) {
        const T a = A[i * scan.states + n] * T(1.44269504088896340736);
        A2[n][i] = a;
        const T magnitude = a < 0 ? -a : a;
        if (!(magnitude <= steepest[i])) steepest[i] = magnitude;  // a NaN stays, and no bound holds
      }
    }
  }

  int64_t tiles() const { return ceil_div(scan.length, kTile); }

  // Go to tile `k`, counted in the order of the scan: read B, C, and what depends on u and delta alone.
  void enter(int64_t k) {
    const int64_t position = scan.reverse ? tiles() - 1 - k : k;
    start = position * kTile;
    steps = smaller(kTile, scan.length - start);
    for (int64_t n = 0; n < scan.states; ++n) {
      const IO *b = row<IO>(scan.B, image, n) + start, *c = row<IO>(scan.C, image, n) + start;
      for (int64_t t = 0; t < steps; t += W) {
        store(B + n * kTile + t, read<T>(b + t, steps - t));
        store(C + n * kTile + t, read<T>(c + t, steps - t));
      }
    }
    V exponents{};  // at least the largest |dt A log2(e)|: a sum costs one instruction, and is far below the limit
    for (int64_t t = 0; t < steps; t += W) {
      V step[W], added[W];
      for (int i = 0; i < W; ++i) {
        if (i >= lanes) {
          step[i] = added[i] = V{};
          continue;
        }
        step[i] = softplus<T>(biased_delta(i, t));
        added[i] = step[i] * u(i, t);
        exponents += step[i] * steepest[i];
      }
      transpose(step);
      transpose(added);
      for (int i = 0; i < W; ++i) {
        dt[t + i] = step[i];
        dtu[t + i] = added[i];
        y[t + i] = V{};
      }
    }
    bounded = true;
    for (int j = 0; j < W; ++j) bounded &= exponents[j] < T(1 << 21);
  }

  // W steps of channel `i`, from step `t` of the tile on.
  V u(int i, int64_t t) const { return steps_of(scan.u, i, t); }
  V z(int i, int64_t t) const { return steps_of(scan.z, i, t); }
  V biased_delta(int i, int64_t t) const {
    return steps_of(scan.delta, i, t) + static_cast<const T*>(scan.delta_bias)[first + i];
  }
  T skip(int i) const { return static_cast<const T*>(scan.D)[first + i]; }
  V steps_of(const MdnetRows& rows, int i, int64_t t) const {
    return read<T>(row<IO>(rows, image, first + i) + start + t, steps - t);
  }
};

// The sequence of the recurrence: `step` is 1 or -1.
struct Order {
  int64_t begin, step, count;
};

template <typename G>
Order order_of(const G& group) {
  return group.scan.reverse ? Order{group.steps - 1, -1, group.steps} : Order{0, 1, group.steps};
}

// Take the states n, n + 1, ... through the tile. Unrolled: they stay in registers.
template <bool Bounded, typename G, size_t... I>
void advance_states(G& g, int64_t n, std::index_sequence<I...>) {
  using T = typename G::Scalar;
  Vector<T> h[sizeof...(I)] = {g.h[n + I]...};
  const Vector<T>* A2 = g.A2 + n;
  const T *B = g.B + n * kTile, *C = g.C + n * kTile;
  const Order order = order_of(g);
  int64_t t = order.begin;
  for (int64_t count = 0; count < order.count; ++count, t += order.step) {
    const Vector<T> dt = g.dt[t], dtu = g.dtu[t];
    Vector<T> sum = g.y[t];
    ((h[I] = exp2_product<Bounded, T>(dt, A2[I]) * h[I] + dtu * B[I * kTile + t], sum += h[I] * C[I * kTile + t]), ...);
    g.y[t] = sum;
  }
  ((g.h[n + I] = h[I]), ...);
}

template <bool Bounded, typename G>
void advance(G& g) {
  int64_t n = 0;
  const int64_t states = g.scan.states;
  for (; n + 16 <= states; n += 16) advance_states<Bounded>(g, n, std::make_index_sequence<16>{});
  for (; n + 4 <= states; n += 4) advance_states<Bounded>(g, n, std::make_index_sequence<4>{});
  for (; n < states; ++n) advance_states<Bounded>(g, n, std::make_index_sequence<1>{});
}

template <typename G>
void advance(G& g) {
  g.bounded ? advance<true>(g) : advance<false>(g);
}

template <typename T, typename IO>
void write_y(Group<T, IO>& g) {
  constexpr int W = kWidth<T>;
  for (int64_t t = 0; t < g.steps; t += W) {
    Vector<T> rows[W];
    for (int i = 0; i < W; ++i) rows[i] = g.y[t + i];
    transpose(rows);
    for (int i = 0; i < g.lanes; ++i) {
      IO* y = static_cast<IO*>(g.scan.y) + (g.image * g.scan.channels + g.first + i) * g.scan.length + g.start + t;
      write<T>(y, (rows[i] + g.skip(i) * g.u(i, t)) * silu<T>(g.z(i, t)), g.steps - t);
    }
  }
}

template <typename T, typename IO>
int forward_group(const MdnetScan& scan, int64_t task) {
  using G = Group<T, IO>;
  const int64_t groups = ceil_div(scan.channels, G::W);
  Arena arena(G::bytes(scan.states));
  if (!arena) return MDNET_NO_MEMORY;
  G group(scan, task / groups, task % groups * G::W, arena);
  for (int64_t k = 0; k < group.tiles(); ++k) {
    group.enter(k);
    advance(group);
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

// The backward pass of a group. The state before each tile is kept; within a tile, states are computed again.
template <typename T>
struct Backward {
  using V = Vector<T>;
  using G = Group<T, T>;
  static constexpr int W = kWidth<T>;

  G& g;
  const MdnetScanGradients& out;
  const int64_t states;
  T *grad_B, *grad_C;                // this task's part: [length][scan.states]
  V* before;                         // [tiles][states]
  V *decay, *state;                  // [kTile][states]
  V *carry, *grad_A;                 // [states]: the gradient that step t+1 hands to h[t]
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
    for (int64_t n = 0; n < states; ++n) carry[n] = grad_A[n] = V{};
  }

  void run() {
    const int64_t last = g.tiles() - 1;
    for (int64_t k = 0; k < last; ++k) {
      keep(k);
      g.enter(k);
      advance(g);
    }
    keep(last);
    for (int64_t k = last; k >= 0; --k) {
      g.enter(k);
      enter_gradients();
      g.bounded ? recompute<true>(k) : recompute<false>(k);
      retrace(k);
      write_rows();
    }
    write_parameters();
  }

  void keep(int64_t k) {
    for (int64_t n = 0; n < states; ++n) before[k * states + n] = g.h[n];
  }

  V grad_y(int i, int64_t t) const { return g.steps_of(out.grad, i, t); }

  // The gradient of the ungated output, transposed.
  void enter_gradients() {
    for (int64_t t = 0; t < g.steps; t += W) {
      V rows[W];
      for (int i = 0; i < W; ++i) rows[i] = i < g.lanes ? grad_y(i, t) * silu<T>(g.z(i, t)) : V{};
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
  void retrace(int64_t k) {
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
    T* to = sums + (g.start + t) * g.scan.states + n;
    const int64_t count = g.scan.states - n;
    write<T>(to, read<T>(to, count) + value, count);
  }

  // Back to rows along time: what u, delta and z get.
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
        const V u = g.u(i, t), z = g.z(i, t), grad = grad_y(i, t), delta = g.biased_delta(i, t);
        const V gate = sigmoid<T>(z), grad_sum_row = grad * silu<T>(z);
        const V y = sums[i] + g.skip(i) * u;
        const V grad_delta = (dts[i] + dtus[i] * u) * sigmoid<T>(delta);  // softplus' is the sigmoid
        write<T>(output(out.z, i) + t, grad * y * gate * (T(1) + z * (T(1) - gate)), count);
        write<T>(output(out.u, i) + t, dtus[i] * softplus<T>(delta) + grad_sum_row * g.skip(i), count);
        write<T>(output(out.delta, i) + t, grad_delta, count);
        const V skipped = grad_sum_row * u;
        for (int64_t j = 0; j < W && j < count; ++j) {
          grad_D[i] += skipped[j];
          grad_bias[i] += grad_delta[j];
        }
      }
    }
  }

  T* output(void* rows, int i) const {
    return static_cast<T*>(rows) + (g.image * g.scan.channels + g.first + i) * g.scan.length + g.start;
  }

  void write_parameters() {
    for (int i = 0; i < g.lanes; ++i) {
      const int64_t channel = g.image * g.scan.channels + g.first + i;
      static_cast<T*>(out.D)[channel] = grad_D[i];
      static_cast<T*>(out.delta_bias)[channel] = grad_bias[i];
      for (int64_t n = 0; n < g.scan.states; ++n) {
        static_cast<T*>(out.A)[channel * g.scan.states + n] = grad_A[n][i];
      }
    }
  }
};

template <typename T>
int backward_split(const MdnetScan& scan, const MdnetScanGradients& out, int64_t task) {
  using G = Group<T, T>;
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

#define MDNET_JOIN_(a, b) a##b
#define MDNET_JOIN(a, b) MDNET_JOIN_(a, b)
extern const MdnetKernel MDNET_JOIN(MDNET_NAMESPACE, _kernel) = {MDNET_NAMESPACE::forward_tasks,
                                                                 MDNET_NAMESPACE::forward, MDNET_NAMESPACE::backward};
