// The C interface of the selective scan, for Python (ctypes) and the ONNX Runtime operators. docs/selective-scan.md has
// the formula.
#pragma once

#include "common/interface.h"

extern "C" {

// Type of u, delta, B, C, z and y. A, D and delta_bias are float, or double with MDNET_FLOAT64.
enum MdnetType { MDNET_FLOAT32 = 0, MDNET_FLOAT64 = 1, MDNET_FLOAT16 = 2, MDNET_BFLOAT16 = 3 };

// Strides are in elements; the steps of a row are contiguous.
struct MdnetRows {
  const void* data;
  int64_t batch_stride;
  int64_t row_stride;
};

struct MdnetScan {
  int64_t batch, channels, length, states;  // each at least 1
  int32_t type;                             // MdnetType
  int32_t reverse;                          // scan from the last step to the first
  int32_t isa;                              // MdnetIsa
  MdnetRows u, delta, z;                    // batch x channels x length
  MdnetRows B, C;                           // batch x states x length
  const void *A, *D, *delta_bias;           // channels x states; channels; channels
  void* y;                                  // batch x channels x length, contiguous
};

// Gradients of the sum of grad * y, in float32 or float64, each contiguous. Gradients of tensors that channels or
// images share come in parts, for the caller to sum over the first axis:
//   A: batch x channels x states     D, delta_bias: batch x channels
//   B, C: splits x batch x length x states, with splits = mdnet_scan_splits(channels)
struct MdnetScanGradients {
  MdnetRows grad;  // batch x channels x length
  void *u, *delta, *A, *B, *C, *D, *z, *delta_bias;
};

int mdnet_scan(const MdnetScan* scan, MdnetParallelFor parallel_for, void* host);
int64_t mdnet_scan_splits(int64_t channels);

// The forward pass, or the backward pass where `gradients` is not null, on the threads of an OpenMP runtime that the
// caller has loaded: `gomp_parallel` is its GOMP_parallel. If that is null, the scan runs on the calling thread.
int mdnet_scan_openmp(const MdnetScan* scan, const MdnetScanGradients* gradients, void* gomp_parallel, int threads);

// Enqueue the forward pass on a stream of the current CUDA context, through the CUDA driver, which is loaded when first
// needed. Tensors must be contiguous and on the device; strides are ignored, float64 is refused. Returns null, or what
// went wrong as a text that lives until this thread calls again.
const char* mdnet_scan_cuda(const MdnetScan* scan, void* stream);
}
