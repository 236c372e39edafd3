// The C interface of what runs natively between two quantised layers: group normalisation, the residual sum, GEGLU.
//
// See mdnet_engines/quantised_ops.py for the formulas and the operators.
#pragma once

#include "common/interface.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t batch, places, channels;  // x and y: batch x places x channels, contiguous; each at least 1
  int64_t groups;                   // a divisor of channels
  const void* x;                    // uint8_t or float
  const float *gamma, *beta;        // channels
  uint8_t* y;
  float x_scale, y_scale, epsilon;
  int32_t y_zero_point;  // that of x cancels out
  int32_t bytes;         // whether x is uint8_t
  int32_t silu;          // whether SiLU follows
  int32_t isa;           // MdnetIsa
} MdnetGroupNorm;

// y = a + b, where bytes are read as (byte - zero_point) * scale, and y is rounded to bytes if those are wanted.
typedef struct {
  int64_t count;  // of elements, at least 1
  const void* a;  // float, or uint8_t
  const uint8_t* b;
  void* y;                          // float, or uint8_t
  float a_scale, b_scale, y_scale;  // of bytes
  int32_t a_zero_point, b_zero_point, y_zero_point;
  int32_t a_bytes, y_bytes;  // whether a, and y, is uint8_t
  int32_t isa;               // MdnetIsa
} MdnetResidualSum;

// y = h * gelu(g), rounded to bytes, where h and g are the halves of each row of (x - x_zero_point) * x_scale + bias.
typedef struct {
  int64_t rows, channels;  // x: rows x 2 channels, y: rows x channels; each at least 1
  const uint8_t* x;
  const float* bias;  // 2 channels
  uint8_t* y;
  float x_scale, y_scale;
  int32_t x_zero_point, y_zero_point;
  int32_t isa;  // MdnetIsa
} MdnetGeglu;

int mdnet_group_norm(const MdnetGroupNorm* call, MdnetParallelFor parallel_for, void* host);
int mdnet_residual_sum(const MdnetResidualSum* call, MdnetParallelFor parallel_for, void* host);
int mdnet_geglu(const MdnetGeglu* call, MdnetParallelFor parallel_for, void* host);

// The same on the calling thread.
int mdnet_group_norm_here(const MdnetGroupNorm* call);
int mdnet_residual_sum_here(const MdnetResidualSum* call);
int mdnet_geglu_here(const MdnetGeglu* call);

#ifdef __cplusplus
}

// Some places of one image.
struct MdnetPlaces {
  int64_t image, first, count;
};

// What normalises an image's channels: (x - mean) * scale + offset. Readable a vector's width behind the last.
struct MdnetChannels {
  float *mean, *scale, *offset;
};

struct MdnetQuantisedKernel {
  // Sums over some places, for each channel: of x and of its square. A float x counts from its image's first place.
  void (*add_up)(const MdnetGroupNorm& call, const MdnetPlaces& places, double* sums, double* squares);
  // y at some places.
  void (*apply)(const MdnetGroupNorm& call, const MdnetPlaces& places, const MdnetChannels& channels);
  // A residual sum's elements from `first` on, before `end`.
  void (*sum)(const MdnetResidualSum& call, int64_t first, int64_t end);
  // Rows of y from `first` on, before `end`.
  void (*geglu)(const MdnetGeglu& call, int64_t first, int64_t end);
};

extern const MdnetQuantisedKernel mdnet_portable_quantised;
extern const MdnetQuantisedKernel mdnet_avx2_quantised;
extern const MdnetQuantisedKernel mdnet_avx512_quantised;
#endif
