// What the operators share: reading tensors of ONNX Runtime, its threads, and shapes for people.
#pragma once

#include <stdio.h>
#include <string.h>

#include "onnxruntime/c_api.h"

#define MDNET_TRY(call) \
  if (OrtStatus* status = (call)) return status

namespace {

constexpr size_t kMaxRank = 8;

struct Shape {
  int64_t sizes[kMaxRank];  // those of the first axes, where there are more
  size_t rank;

  bool is(size_t wanted, const int64_t* other) const {
    return rank == wanted && memcmp(sizes, other, wanted * sizeof *sizes) == 0;
  }
};

inline OrtStatus* read_value(const OrtApi& api, const OrtValue* value, const void** data, Shape* shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  MDNET_TRY(api.GetTensorTypeAndShape(value, &info));
  OrtStatus* status = api.GetDimensionsCount(info, &shape->rank);
  const size_t kept = shape->rank < kMaxRank ? shape->rank : kMaxRank;
  if (!status) status = api.GetDimensions(info, shape->sizes, kept);
  api.ReleaseTensorTypeAndShapeInfo(info);
  if (status) return status;
  void* bytes = nullptr;
  MDNET_TRY(api.GetTensorMutableData(const_cast<OrtValue*>(value), &bytes));  // there is no const form in version 20
  *data = bytes;
  return nullptr;
}

inline OrtStatus* read_input(const OrtApi& api, OrtKernelContext* context, size_t index, const void** data,
                             Shape* shape) {
  const OrtValue* value = nullptr;
  MDNET_TRY(api.KernelContext_GetInput(context, index, &value));
  return read_value(api, value, data, shape);
}

struct Pool {
  const OrtApi& api;
  OrtKernelContext* context;
  OrtStatus* status;

  static void parallel_for(void* host, void (*task)(void*, size_t), void* argument, size_t count) {
    Pool& pool = *static_cast<Pool*>(host);
    if (!pool.status) pool.status = pool.api.KernelContext_ParallelFor(pool.context, task, count, count, argument);
  }
};

// What the operators have in common: they run on the CPU, have one output, and need all their inputs.
inline OrtCustomOp plain_operator() {
  OrtCustomOp op = {};
  op.version = kOrtApiVersion;
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
  op.GetInputCharacteristic = op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ORT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ORT_MEM_DEFAULT; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

}  // namespace

// Add the operators of quantised.cpp, matmul.cpp, attention.cpp and conv.cpp to the domain.
OrtStatus* mdnet_add_quantised(const OrtApi& api, OrtCustomOpDomain* domain);
OrtStatus* mdnet_add_products(const OrtApi& api, OrtCustomOpDomain* domain);
OrtStatus* mdnet_add_attention(const OrtApi& api, OrtCustomOpDomain* domain);
OrtStatus* mdnet_add_convs(const OrtApi& api, OrtCustomOpDomain* domain);
