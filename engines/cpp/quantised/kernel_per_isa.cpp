// Group normalisation over some places of an image, a part of a residual sum, some rows of GEGLU. CMake compiles this
// file once per instruction set. Channels lie side by side: they are the lanes of a vector, and no step sums across
// lanes.
#include "quantised/quantised.h"
#include "simd/math.h"

namespace MDNET_NAMESPACE {
namespace {

constexpr int W = kWidth<float>;
using Floats = Vector<float>;
typedef uint8_t Bytes __attribute__((vector_size(W)));

template <typename T>
const T* x_at(const MdnetGroupNorm& call, int64_t image, int64_t place) {
  return static_cast<const T*>(call.x) + (image * call.places + place) * call.channels;
}

// Sums are short at first: integers that can't overflow, or so few floats that hardly a bit is lost.
template <typename T>
struct Short;
template <>
struct Short<uint8_t> {
  using Sum = uint32_t;
  static constexpr int64_t kPlaces = 65536;  // times 255 * 255 is less than 2^32
};
template <>
struct Short<float> {
  using Sum = float;
  static constexpr int64_t kPlaces = 32;
};

template <typename T>
void add_up(const MdnetGroupNorm& call, const MdnetPlaces& places, double* sums, double* squares) {
  using Sum = typename Short<T>::Sum;
  constexpr int64_t kChannels = 256;
  for (int64_t c = 0; c < call.channels; ++c) sums[c] = squares[c] = 0;
  for (int64_t first = 0; first < call.channels; first += kChannels) {
    const int64_t width = call.channels - first < kChannels ? call.channels - first : kChannels;
    const T* about = x_at<T>(call, places.image, 0) + first;
    const T* x = x_at<T>(call, places.image, places.first) + first;
    for (int64_t done = 0; done < places.count; done += Short<T>::kPlaces) {
      Sum sum[kChannels] = {}, square[kChannels] = {};
      const int64_t left = places.count - done;
      for (int64_t i = left < Short<T>::kPlaces ? left : Short<T>::kPlaces; i > 0; --i, x += call.channels) {
        for (int64_t c = 0; c < width; ++c) {
          Sum value = x[c];
          if constexpr (sizeof(T) == sizeof(float)) value -= about[c];
          sum[c] += value;
          square[c] += value * value;
        }
      }
      for (int64_t c = 0; c < width; ++c) {
        sums[first + c] += sum[c];
        squares[first + c] += square[c];
      }
    }
  }
}

// The W values from there on. GCC 12 would convert bytes one lane at a time.
inline Floats widened(const float* from) { return load<Floats>(from); }
inline Floats widened(const uint8_t* from) {
#if MDNET_VECTOR_BYTES == 64
  const __m512i values = _mm512_maskz_cvtepu8_epi32(0xffff, load<__m128i>(from));
  return __builtin_convertvector(Bits<float>(values), Floats);
#elif MDNET_VECTOR_BYTES == 32
  const __m256i values = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return __builtin_convertvector(Bits<float>(values), Floats);
#else
  return __builtin_convertvector(load<Bytes>(from), Floats);
#endif
}

// W integers from 0 to 255 as bytes.
inline void store_bytes(uint8_t* to, Bits<float> values) {
#if MDNET_VECTOR_BYTES == 32
  const __m256i all = __m256i(values);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  store(to, __builtin_convertvector(values, Bytes));
#endif
}

// Rounds floats to bytes.
class Rounding {
 public:
  Rounding(float scale, int32_t zero_point)
      : per_unit_(splat(1.0f / scale)),
        lowest_(splat(float(-zero_point))),
        highest_(splat(float(255 - zero_point))),
        zero_point_(Bits<float>{} + (zero_point - int32_t(as_bits(Traits<float>::kMagic)))) {}

  void store(uint8_t* to, Floats v) const {
    // The addition rounds half to even, and leaves the integer in the low bits.
    v = at_most(at_least(v * per_unit_, lowest_), highest_) + Traits<float>::kMagic;
    Bits<float> bits;
    memcpy(&bits, &v, sizeof bits);
    store_bytes(to, bits + zero_point_);
  }

 private:
  Floats per_unit_, lowest_, highest_;
  Bits<float> zero_point_;
};

template <bool Silu, typename T>
void apply(const MdnetGroupNorm& call, const MdnetPlaces& places, const MdnetChannels& channels) {
  const float *mean = channels.mean, *scale = channels.scale, *offset = channels.offset;
  const Rounding rounding(call.y_scale, call.y_zero_point);
  const auto run = [&](const T* x, int64_t c, uint8_t* y) {
    Floats v = (widened(x) - load<Floats>(mean + c)) * load<Floats>(scale + c) + load<Floats>(offset + c);
    if constexpr (Silu) v = silu<float>(v);
    rounding.store(y, v);
  };
  const T* x = x_at<T>(call, places.image, places.first);
  uint8_t* y = call.y + (places.image * call.places + places.first) * call.channels;
  for (int64_t i = 0; i < places.count; ++i, x += call.channels, y += call.channels) {
    int64_t c = 0;
    for (; c + W <= call.channels; c += W) run(x + c, c, y + c);
    if (c == call.channels) continue;
    T last[W] = {};
    uint8_t result[W];
    memcpy(last, x + c, size_t(call.channels - c) * sizeof(T));
    run(last, c, result);
    memcpy(y + c, result, size_t(call.channels - c));
  }
}

// What bytes stand for.
class Reading {
 public:
  Reading(float scale, int32_t zero_point) : scale_(splat(scale)), zero_point_(splat(float(zero_point))) {}
  Floats operator()(const uint8_t* from) const { return (widened(from) - zero_point_) * scale_; }
  Floats operator()(const float* from) const { return load<Floats>(from); }

 private:
  Floats scale_, zero_point_;
};

template <typename A, typename Y>
void sum(const MdnetResidualSum& call, int64_t first, int64_t end) {
  const Reading a_of(call.a_scale, call.a_zero_point), b_of(call.b_scale, call.b_zero_point);
  const Rounding rounding(call.y_scale, call.y_zero_point);
  const auto run = [&](const A* a, const uint8_t* b, Y* y) {
    const Floats value = a_of(a) + b_of(b);
    if constexpr (sizeof(Y) == 1) {
      rounding.store(y, value);
    } else {
      store(y, value);
    }
  };
  const A* a = static_cast<const A*>(call.a);
  Y* y = static_cast<Y*>(call.y);
  int64_t i = first;
  for (; i + W <= end; i += W) run(a + i, call.b + i, y + i);
  if (i == end) return;
  A last_a[W] = {};
  uint8_t last_b[W] = {};
  Y result[W];
  memcpy(last_a, a + i, size_t(end - i) * sizeof(A));
  memcpy(last_b, call.b + i, size_t(end - i));
  run(last_a, last_b, result);
  memcpy(y + i, result, size_t(end - i) * sizeof(Y));
}

void sum_any(const MdnetResidualSum& call, int64_t first, int64_t end) {
  const auto chosen = call.a_bytes ? (call.y_bytes ? sum<uint8_t, uint8_t> : sum<uint8_t, float>)
                                   : (call.y_bytes ? sum<float, uint8_t> : sum<float, float>);
  chosen(call, first, end);
}

// x * Phi(x), of which erf's approximation 7.1.26 in Abramowitz and Stegun (1964) has an error of 1.5e-7.
inline Floats gelu(Floats x) {
  const Floats distance = at_least(x, -x) * 0.70710678f;
  const Floats t = reciprocal<float>(distance * 0.3275911f + 1.0f);
  Floats p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Floats tail = p * t * exp_of<float>(-distance * distance) * 0.5f;  // Phi(-|x|)
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

void geglu(const MdnetGeglu& call, int64_t first, int64_t end) {
  const Rounding rounding(call.y_scale, call.y_zero_point);
  const Reading x_of(call.x_scale, call.x_zero_point);
  const auto run = [&](const uint8_t* h, const uint8_t* g, const float* h_bias, const float* g_bias, uint8_t* y) {
    rounding.store(y, (x_of(h) + load<Floats>(h_bias)) * gelu(x_of(g) + load<Floats>(g_bias)));
  };
  const int64_t n = call.channels;
  for (int64_t row = first; row < end; ++row) {
    const uint8_t *h = call.x + row * 2 * n, *g = h + n;
    uint8_t* y = call.y + row * n;
    int64_t c = 0;
    for (; c + W <= n; c += W) run(h + c, g + c, call.bias + c, call.bias + n + c, y + c);
    if (c == n) continue;
    const size_t left = size_t(n - c);
    uint8_t last_h[W] = {}, last_g[W] = {}, result[W];
    float h_bias[W] = {}, g_bias[W] = {};
    memcpy(last_h, h + c, left);
    memcpy(last_g, g + c, left);
    memcpy(h_bias, call.bias + c, left * sizeof(float));
    memcpy(g_bias, call.bias + n + c, left * sizeof(float));
    run(last_h, last_g, h_bias, g_bias, result);
    memcpy(y + c, result, left);
  }
}

void add_up_any(const MdnetGroupNorm& call, const MdnetPlaces& places, double* sums, double* squares) {
  (call.bytes ? add_up<uint8_t> : add_up<float>)(call, places, sums, squares);
}

void apply_any(const MdnetGroupNorm& call, const MdnetPlaces& places, const MdnetChannels& channels) {
  const auto chosen = call.bytes ? (call.silu ? apply<true, uint8_t> : apply<false, uint8_t>)
                                 : (call.silu ? apply<true, float> : apply<false, float>);
  chosen(call, places, channels);
}

}  // namespace
}  // namespace MDNET_NAMESPACE

#define MDNET_JOIN_(a, b) a##b
#define MDNET_JOIN(a, b) MDNET_JOIN_(a, b)
extern const MdnetQuantisedKernel MDNET_JOIN(MDNET_NAMESPACE, _quantised) = {
    MDNET_NAMESPACE::add_up_any, MDNET_NAMESPACE::apply_any, MDNET_NAMESPACE::sum_any, MDNET_NAMESPACE::geglu};
