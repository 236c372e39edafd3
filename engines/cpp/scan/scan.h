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
  MdnetRows u, delta, z;                    // batch x channels x length; z.data may be null: no gate
  MdnetRows B, C;                           // batch x (groups x states) x length
  const void *A, *D, *delta_bias;           // channels x states; channels; channels. The last two may be null
  void* y;                                  // batch x channels x length, contiguous

  // What a call that knows nothing of these members leaves at 0 is version 1 of the operator.
  int32_t groups;       // channel d takes group d / (channels / groups) of B and C; 0 counts as 1
  int32_t no_softplus;  // delta + delta_bias is the size of the step itself
  const void* h0;       // batch x channels x states, in the type of A: before the first step. Null: zeros
  void* h_last;         // the same after the last step. Null: not wanted. It may be h0
};

// Gradients of the sum of grad * y, in float32 or float64, each contiguous. Gradients of tensors that channels or
// images share come in parts, for the caller to sum over the first axis:
//   A: batch x channels x states     D, delta_bias: batch x channels
//   B, C: splits x batch x groups x length x states, with splits = mdnet_scan_splits(channels / groups)
// Those of inputs that the call lacks are not written.
struct MdnetScanGradients {
  MdnetRows grad;  // batch x channels x length
  void *u, *delta, *A, *B, *C, *D, *z, *delta_bias;
  const void* h_last;  // the gradient of h_last, batch x channels x states; null: zeros
  void* h0;            // null: not wanted
};

int mdnet_scan(const MdnetScan* scan, MdnetParallelFor parallel_for, void* host);
int64_t mdnet_scan_splits(int64_t channels_of_a_group);

// The forward pass, or the backward pass where `gradients` is not null, on the threads of an OpenMP runtime that the
// caller has loaded: `gomp_parallel` is its GOMP_parallel. If that is null, the scan runs on the calling thread.
int mdnet_scan_openmp(const MdnetScan* scan, const MdnetScanGradients* gradients, void* gomp_parallel, int threads);

// Enqueue the forward pass on a stream of the current CUDA context, through the CUDA driver, which is loaded when first
// needed. Tensors must be contiguous and on the device; strides are ignored, float64 is refused. What may be null on
// the CPU may be null here. Returns null, or what went wrong as a text that lives until this thread calls again.
const char* mdnet_scan_cuda(const MdnetScan* scan, void* stream);
}
