// Matrix products with AVX-512 BF16: one instruction multiplies 16 pairs of bfloat16 and adds both products to 16
// floats. A tile of y takes 24 registers, b two, and a one: each pair of a is broadcast.
#include <immintrin.h>
#include <string.h>

#include "matmul/kernel.h"

namespace {

constexpr int64_t kWidth = 16;  // floats of a register

__mmask16 first_lanes(int64_t count) { return __mmask16(count >= kWidth ? 0xffff : count <= 0 ? 0 : (1 << count) - 1); }

// 16 pairs: low halves from `low`, high ones from `high`.
__m512i paired(__m512 low, __m512 high) {
  // The variants with a mask: GCC 12 warns about its own definition of the others.
  const __m512i first = _mm512_maskz_cvtepu16_epi32(0xffff, __m256i(_mm512_cvtneps_pbh(low)));
  const __m512i second = _mm512_maskz_cvtepu16_epi32(0xffff, __m256i(_mm512_cvtneps_pbh(high)));
  return _mm512_or_si512(first, _mm512_maskz_slli_epi32(0xffff, second, 16));
}

// Up to 16 pairs of a row that has `left` more values.
__m512i row_pairs(const float* from, int64_t left) {
  const __m512 low = _mm512_maskz_loadu_ps(first_lanes(left), from);
  const __m512 high = _mm512_maskz_loadu_ps(first_lanes(left - kWidth), from + (left > kWidth ? kWidth : 0));
  return __m512i(_mm512_cvtne2ps_pbh(high, low));
}

// Up to 16 columns of two rows, the second of which may be missing.
__m512i column_pairs(const float* rows, int64_t stride, bool both, __mmask16 columns) {
  const __m512 low = _mm512_maskz_loadu_ps(columns, rows);
  return paired(low, both ? _mm512_maskz_loadu_ps(columns, rows + stride) : _mm512_setzero_ps());
}

void pack_a(const MdnetMatmul& call, int64_t matrix, int64_t panel, int64_t first, int64_t count, uint32_t* to) {
  const float* a = call.a + matrix * call.rows * call.inner;
  const int64_t row = panel * kRows, rows = smaller(call.rows - row, kRows);
  if (rows < kRows) memset(to, 0, size_t(kRows * count) * sizeof *to);
  if (!call.a_transposed) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = a + (row + r) * call.inner;
      for (int64_t pair = 0; pair < count; pair += kWidth) {
        const int64_t k = 2 * (first + pair);
        const __m512i pairs = row_pairs(from + k, call.inner - k);
        _mm512_mask_storeu_epi32(to + r * count + pair, first_lanes(count - pair), pairs);
      }
    }
    return;
  }
  for (int64_t pair = 0; pair < count; ++pair) {
    const int64_t k = 2 * (first + pair);
    alignas(64) uint32_t column[kWidth];
    _mm512_store_si512(column, column_pairs(a + k * call.rows + row, call.rows, k + 1 < call.inner, first_lanes(rows)));
    for (int64_t r = 0; r < rows; ++r) to[r * count + pair] = column[r];
  }
}

void pack_b(const MdnetMatmul& call, int64_t matrix, int64_t panel, uint32_t* to) {
  const float* b = call.b + matrix * call.inner * call.columns;
  const int64_t pairs = ceil_div(call.inner, 2), column = panel * kColumns;
  const int64_t columns = smaller(call.columns - column, kColumns), width = columns > kWidth ? kColumns : kWidth;
  if (!call.b_transposed) {
    for (int64_t pair = 0; pair < pairs; ++pair, to += width) {
      const float* from = b + 2 * pair * call.columns + column;
      for (int64_t c = 0; c < width; c += kWidth) {
        const bool both = 2 * pair + 1 < call.inner;
        const int64_t skipped = smaller(c, columns);  // or the address could lie past the end
        _mm512_storeu_si512(to + c, column_pairs(from + skipped, call.columns, both, first_lanes(columns - c)));
      }
    }
    return;
  }
  if (columns < width) memset(to, 0, size_t(pairs * width) * sizeof *to);
  for (int64_t pair = 0; pair < pairs; pair += kWidth) {
    const int64_t k = 2 * pair, count = smaller(pairs - pair, kWidth);
    for (int64_t c = 0; c < columns; ++c) {
      alignas(64) uint32_t row[kWidth];
      _mm512_store_si512(row, row_pairs(b + (column + c) * call.inner + k, call.inner - k));
      for (int64_t i = 0; i < count; ++i) to[(pair + i) * width + c] = row[i];
    }
  }
}

template <int Registers>
void multiply(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t pairs, bool add, float* y, int64_t y_stride,
              int64_t rows, int64_t columns) {
  const __mmask16 masks[2] = {first_lanes(columns), first_lanes(columns - kWidth)};
  __m512 sums[kRows][Registers];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < Registers; ++v) {
      sums[r][v] =
          add && r < rows ? _mm512_maskz_loadu_ps(masks[v], y + r * y_stride + v * kWidth) : _mm512_setzero_ps();
    }
  }
  const uint32_t* thirds[kRows / 3] = {a, a + 3 * stride, a + 6 * stride, a + 9 * stride};
  for (int64_t pair = 0; pair < pairs; ++pair, b += Registers * kWidth) {
    __m512bh columns_of_b[Registers];
#pragma GCC unroll 2
    for (int v = 0; v < Registers; ++v) columns_of_b[v] = __m512bh(_mm512_loadu_si512(b + v * kWidth));
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const __m512bh pair_of_a = __m512bh(_mm512_set1_epi32(int32_t(thirds[r / 3][pair + r % 3 * stride])));
#pragma GCC unroll 2
      for (int v = 0; v < Registers; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], pair_of_a, columns_of_b[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 2
    for (int v = 0; v < Registers; ++v) {
      _mm512_mask_storeu_ps(y + r * y_stride + v * kWidth, masks[v], sums[r][v]);
    }
  }
}

void multiply_any(const MdnetMatmul& call, const uint32_t* a, int64_t stride, const uint32_t* b, int64_t b_panel,
                  int64_t pairs, bool add, int64_t image, int64_t a_panel) {
  const int64_t row = a_panel * kRows, column = b_panel * kColumns, columns = smaller(call.columns - column, kColumns);
  float* y = call.y + (image * call.rows + row) * call.columns + column;
  const auto chosen = columns > kWidth ? multiply<2> : multiply<1>;
  chosen(a, stride, b, pairs, add, y, call.columns, smaller(call.rows - row, kRows), columns);
}

// join(join(lane 0, lane 1), lane 2) and so on: always in this order.
template <typename Join>
float joined(__m512 lanes, Join join) {
  alignas(64) float values[kWidth];
  _mm512_store_ps(values, lanes);
  float result = values[0];
  for (int i = 1; i < kWidth; ++i) result = join(result, values[i]);
  return result;
}

float highest_of(const float* x, int64_t count) {
  __m512 most = _mm512_set1_ps(-__builtin_inff());
  for (int64_t i = 0; i < count; i += kWidth) {
    const __mmask16 lanes = first_lanes(count - i);
    most = _mm512_mask_max_ps(most, lanes, most, _mm512_maskz_loadu_ps(lanes, x + i));
  }
  return joined(most, [](float a, float b) { return a > b ? a : b; });
}

// exp(x - highest) of up to 16 values, 0 behind them: 2^x by a polynomial whose error, 7.5e-5, is small beside the
// rounding to bfloat16 that follows.
__m512 powers(const float* x, int64_t left, __m512 scaled_highest) {
  const __m512 values = _mm512_maskz_loadu_ps(first_lanes(left), x);
  const __m512 power = _mm512_fmsub_ps(values, _mm512_set1_ps(1.44269504f), scaled_highest);
  const __m512 fraction = _mm512_maskz_reduce_ps(0xffff, power, 9);  // above the next lower integer
  __m512 p = _mm512_set1_ps(0.0780243278f);
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.2260674238f));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.6958334446f));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.9999251962f));
  return _mm512_maskz_scalef_ps(first_lanes(left), p, power);
}

void softmax(const float* x, int64_t rows, int64_t columns, uint32_t* pairs, float* inverse_sums) {
  const int64_t count = (columns + 1) / 2;
  if (rows < kRows) memset(pairs, 0, size_t(kRows * count) * sizeof *pairs);
  for (int64_t row = 0; row < rows; ++row, x += columns, pairs += count) {
    const __m512 highest = _mm512_set1_ps(highest_of(x, columns) * 1.44269504f);
    __m512 sums = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < count; pair += kWidth) {
      const int64_t column = 2 * pair, left = columns - column;
      const __m512 low = powers(x + column, left, highest);
      const __m512 high = powers(x + column + (left > kWidth ? kWidth : 0), left - kWidth, highest);
      sums = _mm512_add_ps(sums, _mm512_add_ps(low, high));
      _mm512_mask_storeu_epi32(pairs + pair, first_lanes(count - pair), __m512i(_mm512_cvtne2ps_pbh(high, low)));
    }
    inverse_sums[row] = 1.0f / joined(sums, [](float a, float b) { return a + b; });
  }
}

void scale_rows(float* y, int64_t rows, int64_t columns, const float* factors) {
  for (int64_t row = 0; row < rows; ++row, y += columns) {
    for (int64_t c = 0; c < columns; c += kWidth) {
      const __mmask16 lanes = first_lanes(columns - c);
      const __m512 values = _mm512_maskz_loadu_ps(lanes, y + c);
      _mm512_mask_storeu_ps(y + c, lanes, _mm512_mul_ps(values, _mm512_set1_ps(factors[row])));
    }
  }
}

}  // namespace

extern const MatmulKernel mdnet_avx512_bf16_matmul = {pack_a, pack_b, multiply_any, softmax, scale_rows};
