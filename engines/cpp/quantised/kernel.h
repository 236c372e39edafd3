// What each build of kernel_per_isa.cpp offers to group_norm.cpp and elementwise.cpp.
#pragma once

#include "quantised/quantised.h"

// Some pixels of one image.
struct PixelRange {
  int64_t image, first, count;
};

// What normalises an image's channels: (x - mean) * scale + offset. Readable a vector's width behind the last channel.
struct Normalisation {
  float *mean, *scale, *offset;
};

struct QuantisedKernel {
  // Sums over some pixels, for each channel: of x and of its square. A float x counts from its image's first pixel.
  void (*accumulate)(const MdnetGroupNorm& call, const PixelRange& pixels, double* sums, double* squares);
  // y at some pixels.
  void (*normalise)(const MdnetGroupNorm& call, const PixelRange& pixels, const Normalisation& normalisation);
  // A residual sum's elements from `first` on, before `end`.
  void (*residual_sum)(const MdnetResidualSum& call, int64_t first, int64_t end);
  // Rows of y from `first` on, before `end`.
  void (*geglu)(const MdnetGeglu& call, int64_t first, int64_t end);
};
