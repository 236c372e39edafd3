// SelectiveScan and SelectiveScanReverse on CUDA: one pass over time, the state in registers.
//
//   dt = softplus(delta + delta_bias)
//   h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * u[t] * B[t]        y[t] = (sum_n h[t] * C[t] + D * u[t]) * silu(z[t])
//
//   u, delta, z, y [batch, channels, length]    B, C [batch, states, length]    of type T, contiguous
//   A [channels, states]    D, delta_bias [channels]    float                   length below 2^25
//
// Version 2, `selective_scan2_…`, starts from states h0 and gives the last ones, both [batch, channels, states] and
// float; B and C [batch, groups, states, length] may be shared by groups of channels; D, z, delta_bias and softplus may
// be missing. Pointers to what is missing are null.
//
// What limits it is the special function unit: one exponential per state and step, 16 a clock and multiprocessor,
// against 128 of anything else. So an exponential may cost eight instructions, and what does not depend on the state
// (softplus, gate) is computed once, by one thread.
//
// A block has 32 channels of one batch element; four lanes share a channel's states. Time goes by in tiles of 16 steps:
// the next tile travels from global memory to registers while this one is worked on in shared memory. That turns it:
// threads side by side move steps, which coalesces, but compute channels. `scan_small` shares the work out differently.
//
// Compiles with NVRTC and nvcc for compute capability 8.0 and later, and includes nothing. As plain C++ it needs what
// tests/support/cuda_on_cpu has instead of CUDA and of the PTX instructions below.

namespace {

constexpr float kLog2e = 1.442695041f;
constexpr int kThreads = 128;
constexpr int kLanes = 4;                     // of one channel; consecutive, so within a warp
constexpr int kChannels = kThreads / kLanes;  // of one block
constexpr int kGroup = kLanes;                // steps that are reduced together: each lane ends up with one of them
constexpr int kSteps = 16;                    // of one tile
constexpr int kHalf = kSteps / 2;             // a thread moves step i and step i + 8 of the same rows
constexpr int kRows = kThreads / kHalf;       // that all threads together move at once
constexpr int kPasses = kChannels / kRows;    // for those of u, delta, z and y
template <int kCapacity>
constexpr int kMixPasses = (kCapacity + kRows - 1) / kRows;  // for those of B and C

using Bits = unsigned short;
enum class Half : Bits {};
enum class BFloat16 : Bits {};

#ifdef __CUDACC__
__device__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ float half_to_float(Bits bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}
__device__ Bits float_to_half(float x) {
  Bits bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ Bits float_to_bfloat16(float x) {
  Bits bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

__device__ float to_float(float x) { return x; }
__device__ float to_float(Half x) { return half_to_float(static_cast<Bits>(x)); }
__device__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }
__device__ void assign(float& to, float x) { to = x; }
__device__ void assign(Half& to, float x) { to = static_cast<Half>(float_to_half(x)); }
__device__ void assign(BFloat16& to, float x) { to = static_cast<BFloat16>(float_to_bfloat16(x)); }

// max(x, 0) + log1p(exp(-|x|)): nothing overflows, and far below zero exp(x) is left with its relative precision, which
// the hardware's logarithm lacks near one. The polynomial is log1p(e) / e on [0, 1], minimax in relative error;
// rounding included it is right to 3.1 * 2^-24.
__device__ float softplus(float x) {
  const float e = ex2(fabsf(x) * -kLog2e);
  float p = 0.00523269409f;
  p = fmaf(p, e, -0.0295052379f);
  p = fmaf(p, e, 0.0782259479f);
  p = fmaf(p, e, -0.136632457f);
  p = fmaf(p, e, 0.191060066f);
  p = fmaf(p, e, -0.24842982f);
  p = fmaf(p, e, 0.333190978f);
  p = fmaf(p, e, -0.499994934f);
  p = fmaf(p, e, 0.99999994f);
  return fmaf(p, e, fmaxf(x, 0.0f));  // e is NaN where x is, which fmaxf would hide
}

__device__ float silu(float z) { return z * rcp(1.0f + ex2(z * -kLog2e)); }

// What one instruction loads from shared memory.
template <int kItems>
struct alignas(4 * kItems) Vector {
  float v[kItems];
};
template <int kCapacity>
constexpr int kWidth = kCapacity < 16 ? 1 : 4;  // states in a vector

// The shared memory of a block. Rows of 20 words put what a warp touches at once into different banks: a quad of each
// of eight rows in the scan, eight words of each of four rows that are two apart in `Mover`. For B and C that takes
// rows of 4 modulo 8 words: then four states of each of eight steps are in different banks.
constexpr int kRow = kSteps / 4 + 1;
template <int kCapacity>
constexpr int kMixRow = (kCapacity % 8 == 4 ? kCapacity : kCapacity + 4) / kWidth<kCapacity>;
template <int kCapacity>
struct Tile {
  Vector<4> dt[kChannels][kRow], dtu[kChannels][kRow], z[kChannels][kRow];
  Vector<4> u[kChannels][kRow];  // y, once the tile is done
  Vector<kWidth<kCapacity>> B[kSteps][kMixRow<kCapacity>], C[kSteps][kMixRow<kCapacity>];
};

// What the versions of the operator differ in; what version 1 says is constant, so its kernels have no branch for it.
struct Version1 {
  static constexpr bool kStates = false;
  static constexpr bool softplus = true;
  static __device__ unsigned image() { return blockIdx.x; }
  static __device__ bool has(const void*) { return true; }
};

// A group of B and C counts as an image of its own, whose channels are those of the group. So a block has channels of
// one group only: few channels to a group leave threads idle.
struct Version2 {
  static constexpr bool kStates = true;
  bool softplus;
  int groups;
  const float* h0;
  float* h_last;  // may be h0: a thread reads and writes the same elements
  __device__ unsigned image() const { return blockIdx.x * groups + blockIdx.z; }
  static __device__ bool has(const void* tensor) { return tensor != nullptr; }
};

// A thread's share in moving tiles. kForward is 1, or -1 for the reverse scan; steps count in the scan's direction.
template <typename T, int kCapacity, int kForward, typename Version>
class Mover {
  static __device__ int step() { return threadIdx.x % kHalf; }
  static __device__ int row() { return threadIdx.x / kHalf % 4 * 2 + threadIdx.x / 32 % 2 + threadIdx.x / 64 * 8; }
  static __device__ int state() { return threadIdx.x / kHalf; }

 public:
  __device__ Mover(const Version& version, const T* u, const T* delta, const T* B, const T* C, const T* z, T* y,
                   const float* delta_bias, int channels, int length, int states)
      : version_(version), u_(u), delta_(delta), z_(z), B_(B), C_(C), y_(y), length_(length) {
    const int channel = blockIdx.y * kChannels + row(), first = kForward > 0 ? step() : length - 1 - step();
    at_ = (static_cast<long long>(version.image()) * channels + channel) * length + first;
    mix_at_ = (static_cast<long long>(version.image()) * states + state()) * length + first;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const bool inside = channel + pass * kRows < channels;
      end_[pass] = inside ? length - step() : 0;
      bias_[pass] = inside && version.has(delta_bias) ? delta_bias[channel + pass * kRows] : 0.0f;
    }
#pragma unroll
    for (int pass = 0; pass < kMixPasses<kCapacity>; ++pass)
      mix_end_[pass] = state() + pass * kRows < states ? length - step() : 0;
  }

  // Global memory to registers, for the tile that begins at step `begin`: the present one, or kAhead steps later.
  // Beyond the tensors' ends they keep what they had: zero for channels and states; on later steps no y depends, and
  // `stage` keeps the states from them.
  template <int kAhead>
  __device__ void fetch(int begin) {
#pragma unroll
    for (int i = 0; i < 2 * kPasses; ++i)
      if (begin + i % 2 * kHalf < end_[i / 2]) {
        const long long at = at_ + i / 2 * kRows * length_;
        u_next_[i] = (u_ + at)[(kAhead + i % 2 * kHalf) * kForward];
        delta_next_[i] = (delta_ + at)[(kAhead + i % 2 * kHalf) * kForward];
        if (version_.has(z_)) z_next_[i] = (z_ + at)[(kAhead + i % 2 * kHalf) * kForward];
      }
#pragma unroll
    for (int i = 0; i < 2 * kMixPasses<kCapacity>; ++i)
      if (begin + i % 2 * kHalf < mix_end_[i / 2]) {
        const long long at = mix_at_ + i / 2 * kRows * length_;
        B_next_[i] = (B_ + at)[(kAhead + i % 2 * kHalf) * kForward];
        C_next_[i] = (C_ + at)[(kAhead + i % 2 * kHalf) * kForward];
      }
  }

  // Registers to shared memory, as float and with all that depends on one element only. `begin` is as in `fetch`.
  __device__ void stage(Tile<kCapacity>& tile, int begin) const {
    float dt[2 * kPasses];  // all before the first is written, so that they overlap
#pragma unroll
    for (int i = 0; i < 2 * kPasses; ++i) {
      const float x = to_float(delta_next_[i]) + bias_[i / 2];
      dt[i] = version_.softplus ? softplus(x) : x;
      // A step of no time changes no state. What B and u still hold is finite, or has spoilt the states already.
      if (Version::kStates && begin + i % 2 * kHalf >= end_[i / 2]) dt[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 2 * kPasses; ++i) {
      const int channel = row() + i / 2 * kRows, quad = step() / 4 + i % 2 * (kHalf / 4), item = step() % 4;
      const float u = to_float(u_next_[i]);
      tile.dt[channel][quad].v[item] = dt[i];
      tile.dtu[channel][quad].v[item] = dt[i] * u;
      tile.u[channel][quad].v[item] = u;
      tile.z[channel][quad].v[item] = to_float(z_next_[i]);
    }
    if (state() >= kCapacity) return;  // for four states one warp is enough
    constexpr int width = kWidth<kCapacity>;
#pragma unroll
    for (int i = 0; i < 2 * kMixPasses<kCapacity>; ++i) {
      const int vector = state() / width + i / 2 * (kRows / width), item = state() % width;
      tile.B[step() + i % 2 * kHalf][vector].v[item] = to_float(B_next_[i]);
      tile.C[step() + i % 2 * kHalf][vector].v[item] = to_float(C_next_[i]);
    }
  }

  // y of the tile that begins at step `begin` to global memory, and on to the next tile. A thread reads just those
  // elements that it stages next, so the two need no barrier between them.
  __device__ void store(const Tile<kCapacity>& tile, int begin) {
#pragma unroll
    for (int i = 0; i < 2 * kPasses; ++i) {
      const float y = tile.u[row() + i / 2 * kRows][step() / 4 + i % 2 * (kHalf / 4)].v[step() % 4];
      T* to = y_ + at_ + i / 2 * kRows * length_;
      if (begin + i % 2 * kHalf < end_[i / 2]) assign(to[i % 2 * kHalf * kForward], y);
    }
    at_ += kForward * kSteps;
    mix_at_ += kForward * kSteps;
  }

 private:
  const Version version_;
  const T *const u_, *const delta_, *const z_, *const B_, *const C_;
  T* const y_;
  const int length_;
  long long at_, mix_at_;                              // this thread's first element of the present tile
  int end_[kPasses], mix_end_[kMixPasses<kCapacity>];  // tiles that begin before have that element
  float bias_[kPasses];
  T u_next_[2 * kPasses] = {}, delta_next_[2 * kPasses] = {}, z_next_[2 * kPasses] = {};
  T B_next_[2 * kMixPasses<kCapacity>] = {}, C_next_[2 * kMixPasses<kCapacity>] = {};
};

// The sums over four lanes of four values each; lane i gets the i-th. Three shuffles, not the eight of four reductions:
// what a lane does not want for itself it hands over.
__device__ float transposing_sum(const float (&x)[kGroup], int lane) {
  const bool high = lane & 2, odd = lane & 1;
  float first = high ? x[2] : x[0], second = high ? x[3] : x[1];
  first += __shfl_xor_sync(0xffffffffu, high ? x[0] : x[2], 2);
  second += __shfl_xor_sync(0xffffffffu, high ? x[1] : x[3], 2);
  return (odd ? second : first) + __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
}

// The states of one lane in `scan`, from or to a tensor [batch, channels, states].
template <bool kStore, typename Float, int vectors, int width>
__device__ void move_states(Float* tensor, float (&h)[vectors][width], int lane, unsigned image, int channel,
                            int channels, int states) {
  if (channel >= channels) return;
  Float* const row = tensor + (static_cast<long long>(image) * channels + channel) * states;
#pragma unroll
  for (int vector = 0; vector < vectors; ++vector)
#pragma unroll
    for (int item = 0; item < width; ++item) {
      const int state = (vector * kLanes + lane) * width + item;
      if (state >= states) continue;
      if constexpr (kStore)
        row[state] = h[vector][item];
      else
        h[vector][item] = row[state];
    }
}

// For up to kCapacity states. Those that are missing have A = B = C = 0 and add nothing, as long as dt is finite.
template <typename T, int kCapacity, int kForward, typename Version>
__device__ void scan(Tile<kCapacity>& tile, const Version& version, const T* __restrict__ u,
                     const T* __restrict__ delta, const float* __restrict__ A, const T* __restrict__ B,
                     const T* __restrict__ C, const float* __restrict__ D, const T* __restrict__ z,
                     const float* __restrict__ delta_bias, int channels, int length, int states, T* __restrict__ y) {
  constexpr int width = kWidth<kCapacity>;
  constexpr int vectors = kCapacity / (kLanes * width);  // of a lane; kLanes apart, so that lanes read side by side
  // Groups that are written together: a write would keep the tail of one from overlapping the next one's exponentials.
  constexpr int bundle = vectors > 1 ? 1 : kSteps / kGroup;  // with 64 states one is work enough
  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes, channel = blockIdx.y * kChannels + row;

  float decay_rate[vectors][width], h[vectors][width] = {};
#pragma unroll
  for (int vector = 0; vector < vectors; ++vector)
#pragma unroll
    for (int item = 0; item < width; ++item) {
      const int state = (vector * kLanes + lane) * width + item;
      const long long at = static_cast<long long>(channel) * states + state;
      decay_rate[vector][item] = channel < channels && state < states ? A[at] * kLog2e : 0.0f;
    }
  if constexpr (Version::kStates) {
    if (version.h0) move_states<false>(version.h0, h, lane, version.image(), channel, channels, states);
  }
  const float skip = channel < channels && version.has(D) ? D[channel] : 0.0f;
  // Without z, silu(0) + 1: a choice would make NVRTC write the loop twice.
  const float no_gate = version.has(z) ? 0.0f : 1.0f;
  Mover<T, kCapacity, kForward, Version> mover(version, u, delta, B, C, z, y, delta_bias, channels, length, states);
  mover.template fetch<0>(0);
  for (int begin = 0; begin < length; begin += kSteps) {
    mover.stage(tile, begin);
    __syncthreads();
    if (begin + kSteps < length) mover.template fetch<kSteps>(begin + kSteps);

#pragma unroll 1
    for (int first = 0; first < kSteps / kGroup; first += bundle) {
      float out[bundle];
#pragma unroll
      for (int i = 0; i < bundle; ++i) {
        const int group = first + i;
        const Vector<4> dt = tile.dt[row][group], dtu = tile.dtu[row][group];
        float sum[kGroup] = {};
#pragma unroll
        for (int vector = 0; vector < vectors; ++vector) {
          if (vector > 0 && vector * kLanes * width >= states) break;  // the same for all threads
#pragma unroll
          for (int step = 0; step < kGroup; ++step) {
            const Vector<width> b = tile.B[group * kGroup + step][vector * kLanes + lane];
            const Vector<width> c = tile.C[group * kGroup + step][vector * kLanes + lane];
#pragma unroll
            for (int item = 0; item < width; ++item) {
              float& state = h[vector][item];
              state = fmaf(ex2(dt.v[step] * decay_rate[vector][item]), state, dtu.v[step] * b.v[item]);
              sum[step] = fmaf(state, c.v[item], sum[step]);
            }
          }
        }
        float gate = silu(tile.z[row][group].v[lane]);
        if constexpr (Version::kStates) gate += no_gate;
        out[i] = fmaf(skip, tile.u[row][group].v[lane], transposing_sum(sum, lane)) * gate;
      }
#pragma unroll
      for (int i = 0; i < bundle; ++i) tile.u[row][first + i].v[lane] = out[i];
    }
    __syncthreads();
    mover.store(tile, begin);
  }
  if constexpr (Version::kStates) {
    if (version.h_last) move_states<true>(version.h_last, h, lane, version.image(), channel, channels, states);
  }
}

// `channels` are those of a group, and blockIdx.z is the group.
template <typename T, int kCapacity, int kForward>
__device__ void scan2(Tile<kCapacity>& tile, const T* u, const T* delta, const float* A, const T* B, const T* C,
                      const float* D, const T* z, const float* delta_bias, const float* h0, int channels, int length,
                      int states, int groups, int softplus, T* y, float* h_last) {
  const long long first = static_cast<long long>(blockIdx.z) * channels;
  const Version2 version{softplus != 0, groups, h0, h_last};
  scan<T, kCapacity, kForward>(tile, version, u, delta, A + first * states, B, C, D ? D + first : nullptr, z,
                               delta_bias ? delta_bias + first : nullptr, channels, length, states, y);
}

// The same scan for launches that leave most of a GPU empty, of up to 16 states. A channel has 16 lanes with one state
// each, a block 8 channels: there are four times as many warps, which issue two fifths of the instructions each. A warp
// is then alone on its scheduler, and nobody works while it waits. So a tile has 32 steps, of which more overlap, and
// one barrier, since shared memory has two tiles.
constexpr int kSmallLanes = 16;
constexpr int kSmallChannels = kThreads / kSmallLanes;
constexpr int kSmallSteps = 32;                            // a warp moves whole rows of a tile
constexpr int kSmallRows = kThreads / kSmallSteps;         // that all threads together move at once
constexpr int kSmallPasses = kSmallChannels / kSmallRows;  // for those of u, delta, z and y
constexpr int kSmallMixPasses = kSmallLanes / kSmallRows;  // for those of B and C

// Rows of 36 words: a quad of each of eight rows is in different banks. Rows of `sum` are 16 modulo 32 words apart, for
// the two channels of a warp.
struct SmallTile {
  Vector<4> dt[kSmallChannels][kSmallSteps / 4 + 1], dtu[kSmallChannels][kSmallSteps / 4 + 1];
  Vector<4> B[kSmallLanes][kSmallSteps / 4 + 1], C[kSmallLanes][kSmallSteps / 4 + 1];
  float sum[kSmallChannels][kSmallSteps + 16];  // of the states
};

// The sums over 16 lanes of 16 values each; lane i gets the i-th. Neighbours come first, since they are made first.
__device__ float transposing_sum(float (&x)[kSmallLanes], int lane) {
#pragma unroll
  for (int distance = 1; distance < kSmallLanes; distance *= 2) {
    const bool odd = lane & distance;
#pragma unroll
    for (int i = 0; i < kSmallLanes / (2 * distance); ++i) {
      const float keep = odd ? x[2 * i + 1] : x[2 * i], give = odd ? x[2 * i] : x[2 * i + 1];
      x[i] = keep + __shfl_xor_sync(0xffffffffu, give, distance);
    }
  }
  return x[0];
}

template <typename T, int kForward>
class SmallMover {
  static __device__ int step() { return threadIdx.x % kSmallSteps; }
  static __device__ int row() { return threadIdx.x / kSmallSteps; }  // of channels and of states

 public:
  __device__ SmallMover(const T* u, const T* delta, const T* B, const T* C, const float* D, const T* z, T* y,
                        const float* delta_bias, int channels, int length, int states)
      : rows_(static_cast<long long>(length) * kSmallRows) {
    const int channel = blockIdx.y * kSmallChannels + row(), first = kForward > 0 ? step() : length - 1 - step();
    const long long at = (static_cast<long long>(blockIdx.x) * channels + channel) * length + first;
    const long long mix_at = (static_cast<long long>(blockIdx.x) * states + row()) * length + first;
    u_ = u + at, delta_ = delta + at, z_ = z + at, y_ = y + at, B_ = B + mix_at, C_ = C + mix_at;
#pragma unroll
    for (int i = 0; i < kSmallPasses; ++i) {
      const bool inside = channel + i * kSmallRows < channels;
      end_[i] = inside ? length - step() : 0;
      bias_[i] = inside ? delta_bias[channel + i * kSmallRows] : 0.0f;
      skip_[i] = inside ? D[channel + i * kSmallRows] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kSmallMixPasses; ++i) mix_end_[i] = row() + i * kSmallRows < states ? length - step() : 0;
  }

  // Global memory to registers, for the tile that begins at step `begin`: the first, and then one after the other.
  // Beyond the tensors' ends they keep what they had, as in `Mover`.
  __device__ void fetch(int begin) {
#pragma unroll
    for (int i = 0; i < kSmallPasses; ++i)
      if (begin < end_[i]) {
        u_next_[i] = u_[i * rows_];
        delta_next_[i] = delta_[i * rows_];
        z_next_[i] = z_[i * rows_];
      }
#pragma unroll
    for (int i = 0; i < kSmallMixPasses; ++i)
      if (begin < mix_end_[i]) {
        B_next_[i] = B_[i * rows_];
        C_next_[i] = C_[i * rows_];
      }
    constexpr int forward = kForward * kSmallSteps;
    u_ += forward, delta_ += forward, z_ += forward, B_ += forward, C_ += forward;
  }

  // Registers to shared memory. The thread keeps what it needs itself of its elements, once their sums are known.
  __device__ void stage(SmallTile& tile) {
    float dt[kSmallPasses];  // all before the first is written, so that they overlap
#pragma unroll
    for (int i = 0; i < kSmallPasses; ++i) dt[i] = softplus(to_float(delta_next_[i]) + bias_[i]);
#pragma unroll
    for (int i = 0; i < kSmallPasses; ++i) {
      const float u = to_float(u_next_[i]);
      tile.dt[row() + i * kSmallRows][step() / 4].v[step() % 4] = dt[i];
      tile.dtu[row() + i * kSmallRows][step() / 4].v[step() % 4] = dt[i] * u;
      u_staged_[i] = u;
      z_staged_[i] = to_float(z_next_[i]);
    }
#pragma unroll
    for (int i = 0; i < kSmallMixPasses; ++i) {
      tile.B[row() + i * kSmallRows][step() / 4].v[step() % 4] = to_float(B_next_[i]);
      tile.C[row() + i * kSmallRows][step() / 4].v[step() % 4] = to_float(C_next_[i]);
    }
  }

  // The tile that was staged is the one to be stored next.
  __device__ void advance() {
#pragma unroll
    for (int i = 0; i < kSmallPasses; ++i) u_done_[i] = u_staged_[i], z_done_[i] = z_staged_[i];
  }

  // y of the tile that begins at step `begin` to global memory; as `fetch`, one after the other.
  __device__ void store(const SmallTile& tile, int begin) {
#pragma unroll
    for (int i = 0; i < kSmallPasses; ++i) {
      const float y = fmaf(skip_[i], u_done_[i], tile.sum[row() + i * kSmallRows][step()]) * silu(z_done_[i]);
      if (begin < end_[i]) assign(y_[i * rows_], y);
    }
    y_ += kForward * kSmallSteps;
  }

 private:
  const T *u_, *delta_, *z_, *B_, *C_;                // this thread's first element of the next tile to be fetched
  T* y_;                                              // and to be stored
  const long long rows_;                              // elements in kSmallRows rows
  int end_[kSmallPasses], mix_end_[kSmallMixPasses];  // tiles that begin before have that element
  float bias_[kSmallPasses], skip_[kSmallPasses];
  T u_next_[kSmallPasses] = {}, delta_next_[kSmallPasses] = {}, z_next_[kSmallPasses] = {};
  T B_next_[kSmallMixPasses] = {}, C_next_[kSmallMixPasses] = {};
  float u_staged_[kSmallPasses], z_staged_[kSmallPasses], u_done_[kSmallPasses], z_done_[kSmallPasses];
};

template <typename T, int kForward>
__device__ void scan_small(SmallTile (&tiles)[2], const T* __restrict__ u, const T* __restrict__ delta,
                           const float* __restrict__ A, const T* __restrict__ B, const T* __restrict__ C,
                           const float* __restrict__ D, const T* __restrict__ z, const float* __restrict__ delta_bias,
                           int channels, int length, int states, T* __restrict__ y) {
  const int lane = threadIdx.x % kSmallLanes, row = threadIdx.x / kSmallLanes;
  const int channel = blockIdx.y * kSmallChannels + row;
  const long long at = static_cast<long long>(channel) * states + lane;
  const float decay_rate = channel < channels && lane < states ? A[at] * kLog2e : 0.0f;
  float h = 0.0f;
  SmallMover<T, kForward> mover(u, delta, B, C, D, z, y, delta_bias, channels, length, states);
  mover.fetch(0);
  mover.stage(tiles[0]);
  for (int begin = 0; begin < length; begin += kSmallSteps) {
    SmallTile& tile = tiles[begin / kSmallSteps % 2];
    SmallTile& other = tiles[(begin / kSmallSteps + 1) % 2];
    __syncthreads();  // this tile is staged, the sums of the one before are complete
    if (begin + kSmallSteps < length) mover.fetch(begin + kSmallSteps);
    if (begin > 0) mover.store(other, begin - kSmallSteps);
    mover.advance();
#pragma unroll
    for (int group = 0; group < kSmallSteps / kSmallLanes; ++group) {
      float product[kSmallLanes];
#pragma unroll
      for (int i = 0; i < kSmallLanes / 4; ++i) {
        const int quad = group * (kSmallLanes / 4) + i;
        const Vector<4> dt = tile.dt[row][quad], dtu = tile.dtu[row][quad];
        const Vector<4> b = tile.B[lane][quad], c = tile.C[lane][quad];
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          h = fmaf(ex2(dt.v[step] * decay_rate), h, dtu.v[step] * b.v[step]);
          product[4 * i + step] = h * c.v[step];
        }
      }
      tile.sum[row][group * kSmallLanes + lane] = transposing_sum(product, lane);
    }
    if (begin + kSmallSteps < length) mover.stage(other);
  }
  __syncthreads();
  const int last = (length - 1) / kSmallSteps;
  mover.store(tiles[last % 2], last * kSmallSteps);
}

}  // namespace

// At least six blocks a multiprocessor: 80 registers a thread, which nothing spills. Four blocks and 128 for 64 states
// and for small launches. Version 2 has more to keep, and spilt in as few registers.
#define SELECTIVE_SCAN(direction, forward, suffix, T, capacity)                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads, capacity > 16 ? 4 : 6)                                     \
      selective_scan_##direction##_##suffix##_n##capacity(                                                          \
          const T* u, const T* delta, const float* A, const T* B, const T* C, const float* D, const T* z,           \
          const float* delta_bias, int channels, int length, int states, T* y) {                                    \
    __shared__ Tile<capacity> tile;                                                                                 \
    scan<T, capacity, forward>(tile, Version1{}, u, delta, A, B, C, D, z, delta_bias, channels, length, states, y); \
  }
#define SELECTIVE_SCAN_SMALL(direction, forward, suffix, T)                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, 4) selective_scan_##direction##_##suffix##_n16_small( \
      const T* u, const T* delta, const float* A, const T* B, const T* C, const float* D, const T* z,          \
      const float* delta_bias, int channels, int length, int states, T* y) {                                   \
    __shared__ SmallTile tiles[2];                                                                             \
    scan_small<T, forward>(tiles, u, delta, A, B, C, D, z, delta_bias, channels, length, states, y);           \
  }
#define SELECTIVE_SCAN2(direction, forward, suffix, T, capacity)                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, capacity > 16 ? 3 : 4)                                     \
      selective_scan2_##direction##_##suffix##_n##capacity(                                                         \
          const T* u, const T* delta, const float* A, const T* B, const T* C, const float* D, const T* z,           \
          const float* delta_bias, const float* h0, int channels, int length, int states, int groups, int softplus, \
          T* y, float* h_last) {                                                                                    \
    __shared__ Tile<capacity> tile;                                                                                 \
    scan2<T, capacity, forward>(tile, u, delta, A, B, C, D, z, delta_bias, h0, channels, length, states, groups,    \
                                softplus, y, h_last);                                                               \
  }
#define SELECTIVE_SCAN_BOTH(...) SELECTIVE_SCAN(__VA_ARGS__) SELECTIVE_SCAN2(__VA_ARGS__)
#define SELECTIVE_SCANS(...)          \
  SELECTIVE_SCAN_BOTH(__VA_ARGS__, 4) \
  SELECTIVE_SCAN_BOTH(__VA_ARGS__, 16) SELECTIVE_SCAN_BOTH(__VA_ARGS__, 64) SELECTIVE_SCAN_SMALL(__VA_ARGS__)
SELECTIVE_SCANS(forward, 1, f32, float)
SELECTIVE_SCANS(forward, 1, f16, Half)
SELECTIVE_SCANS(forward, 1, bf16, BFloat16)
SELECTIVE_SCANS(reverse, -1, f32, float)
SELECTIVE_SCANS(reverse, -1, f16, Half)
SELECTIVE_SCANS(reverse, -1, bf16, BFloat16)
