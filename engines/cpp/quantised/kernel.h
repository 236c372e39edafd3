// What each build of kernel_per_isa.cpp offers to group_norm.cpp and elementwise.cpp.
#pragma once

#include "quantised/quantised.h"

// Some pixels of one image.
struct PixelRange {
  int64_t image, first, count;
};

// (x - mean) * scale + offset, for each channel of an image. Padded: a vector can be read at the last one.
struct Normalisation {
  float *mean, *scale, *offset;
};

struct QuantisedKernel {
  // For each channel, the sums of x and of its square over some pixels. From a float x its image's first pixel is
  // subtracted, or values that lie close together, far from 0, would lose their variance.
  void (*accumulate)(const MdnetGroupNorm& call, const PixelRange& pixels, double* sums, double* squares);
  // y at some pixels.
  void (*normalise)(const MdnetGroupNorm& call, const PixelRange& pixels, const Normalisation& normalisation);
  // y from element `first` to before `end`.
  void (*residual_sum)(const MdnetResidualSum& call, int64_t first, int64_t end);
  // y from row `first` to before `end`.
  void (*geglu)(const MdnetGeglu& call, int64_t first, int64_t end);
};
