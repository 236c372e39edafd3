// What all operators share. An Op tells ONNX Runtime an operator's name and types, a Node is a node of a graph, a Run
// is one run of a node. A file of operators derives a struct from Node, with `compute` and, if it has attributes or
// constants, `prepare`; and lists its operators in a table of Op, whose entries differ in name, types and flags.
#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "common/interface.h"
#include "onnxruntime/c_api.h"

#define MDNET_TRY(call) \
  if (OrtStatus* status = (call)) return status

namespace {

constexpr size_t kMaxRank = 8;
constexpr const char *kCpu = "CPUExecutionProvider", *kCuda = "CUDAExecutionProvider";

struct Shape {
  int64_t sizes[kMaxRank];  // of the first axes, where there are more
  size_t rank;

  bool is(size_t wanted, const int64_t* other) const {
    return rank == wanted && memcmp(sizes, other, wanted * sizeof *sizes) == 0;
  }
  int64_t elements() const {
    int64_t product = 1;
    for (size_t axis = 0; axis < rank && axis < kMaxRank; ++axis) product *= sizes[axis];
    return product;
  }
};

struct Tensor {
  const void* data;
  Shape shape;

  const float* floats() const { return static_cast<const float*>(data); }
  const uint8_t* bytes() const { return static_cast<const uint8_t*>(data); }

  OrtStatus* read(const OrtApi& api, const OrtValue* value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    MDNET_TRY(api.GetTensorTypeAndShape(value, &info));
    OrtStatus* status = api.GetDimensionsCount(info, &shape.rank);
    if (!status) status = api.GetDimensions(info, shape.sizes, shape.rank < kMaxRank ? shape.rank : kMaxRank);
    api.ReleaseTensorTypeAndShapeInfo(info);
    if (status) return status;
    void* bytes = nullptr;
    MDNET_TRY(api.GetTensorMutableData(const_cast<OrtValue*>(value), &bytes));  // version 20 has no const variant
    data = bytes;
    return nullptr;
  }
};

// What ONNX Runtime chooses an operator by: several may have one name, for different types or providers.
struct Signature {
  const char* name;
  const char* inputs;  // the type of each, a letter: f float, h float16, g bfloat16, b uint8, c int8
  char output;
  int flags;  // what else the node needs to know
  const char* provider;
  const char* more_outputs;  // the types of those after the first

  static OrtElementType type_of(char letter) {
    return letter == 'f'   ? ORT_FLOAT
           : letter == 'h' ? ORT_FLOAT16
           : letter == 'g' ? ORT_BFLOAT16
           : letter == 'c' ? ORT_INT8
                           : ORT_UINT8;
  }
};

// A node of a graph. It lives as long as its session; several threads may run it at once.
struct Node {
  const OrtApi& api;
  const Signature& op;

  OrtStatus* prepare(const OrtKernelInfo*) { return nullptr; }

  __attribute__((format(printf, 2, 3))) OrtStatus* refuse(const char* format, ...) const {
    char message[384];
    int used = snprintf(message, sizeof message, "%s: ", op.name);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message + used, sizeof message - size_t(used), format, arguments);
    va_end(arguments);
    return api.CreateStatus(ORT_INVALID_ARGUMENT, message);
  }
};

// One run of a node: inputs, output, and ONNX Runtime's threads.
class Run {
 public:
  Run(const Node& node, OrtKernelContext* context) : node_(node), api_(node.api), context_(context) {}

  OrtStatus* input(size_t index, Tensor* tensor) const {
    const OrtValue* value = nullptr;
    MDNET_TRY(api_.KernelContext_GetInput(context_, index, &value));
    return tensor->read(api_, value);
  }

  template <typename T, size_t n>
  OrtStatus* inputs(T (&tensors)[n]) const {
    for (size_t i = 0; i < n && node_.op.inputs[i]; ++i) MDNET_TRY(input(i, &tensors[i]));
    return nullptr;
  }

  template <typename T>
  OrtStatus* output(const int64_t* sizes, size_t rank, T** data, size_t index = 0) const {
    OrtValue* value = nullptr;
    void* bytes = nullptr;
    MDNET_TRY(api_.KernelContext_GetOutput(context_, index, sizes, rank, &value));
    MDNET_TRY(api_.GetTensorMutableData(value, &bytes));
    *data = static_cast<T*>(bytes);
    return nullptr;
  }

  OrtStatus* stream(void** cuda_stream) const { return api_.KernelContext_GetGPUComputeStream(context_, cuda_stream); }

  // Call one of our C interfaces.
  template <typename Call>
  OrtStatus* on_threads(int (*function)(const Call* call, MdnetParallelFor, void* host), const Call& call) {
    const int status = function(&call, parallel_for, this);
    if (problem_ || status == MDNET_OK) return problem_;
    return node_.refuse(status == MDNET_NO_MEMORY ? "no memory" : "sizes out of range");
  }

 private:
  static void parallel_for(void* host, void (*task)(void*, size_t), void* argument, size_t count) {
    Run& run = *static_cast<Run*>(host);
    if (!run.problem_) run.problem_ = run.api_.KernelContext_ParallelFor(run.context_, task, count, count, argument);
  }

  const Node& node_;
  const OrtApi& api_;
  OrtKernelContext* const context_;
  OrtStatus* problem_ = nullptr;  // that ONNX Runtime had with its threads
};

// T is derived from Node. All inputs and outputs of an operator are required. Sessions keep pointers to an Op.
template <typename T>
struct Op : OrtCustomOp {
  const Signature signature;

  constexpr Op(const char* name, const char* inputs, char output, int flags = 0, const char* provider = kCpu,
               const char* more_outputs = "")
      : OrtCustomOp{}, signature{name, inputs, output, flags, provider, more_outputs} {
    version = kOrtApiVersion;
    GetName = [](const OrtCustomOp* op) { return of(op).name; };
    GetExecutionProviderType = [](const OrtCustomOp* op) { return of(op).provider; };
    GetInputTypeCount = [](const OrtCustomOp* op) { return strlen(of(op).inputs); };
    GetInputType = [](const OrtCustomOp* op, size_t i) { return Signature::type_of(of(op).inputs[i]); };
    GetOutputTypeCount = [](const OrtCustomOp* op) { return 1 + strlen(of(op).more_outputs); };
    GetOutputType = [](const OrtCustomOp* op, size_t i) {
      return Signature::type_of(i ? of(op).more_outputs[i - 1] : of(op).output);
    };
    GetInputCharacteristic = GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ORT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ORT_MEM_DEFAULT; };
    GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = create;
    KernelComputeV2 = compute;
    KernelDestroy = destroy;
  }

 private:
  static const Signature& of(const OrtCustomOp* op) { return static_cast<const Op*>(op)->signature; }

  static OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    void* memory = malloc(sizeof(T));  // operator new would need the C++ runtime
    if (!memory) return api->CreateStatus(ORT_FAIL, "no memory for a node");
    T* node = new (memory) T{{*api, of(op)}};
    if (OrtStatus* problem = node->prepare(info)) {
      destroy(node);
      return problem;
    }
    *kernel = node;
    return nullptr;
  }

  static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    const T& node = *static_cast<const T*>(kernel);
    Run run(node, context);
    return node.compute(run);
  }

  static void destroy(void* kernel) {
    static_cast<T*>(kernel)->~T();
    free(kernel);
  }
};

template <typename T, size_t n>
OrtStatus* add_to(OrtCustomOpDomain* domain, const OrtApi& api, const Op<T> (&ops)[n]) {
  for (const Op<T>& op : ops) MDNET_TRY(api.CustomOpDomain_Add(domain, &op));
  return nullptr;
}

}  // namespace

// Each adds the operators of one file to the domain, if this processor has a kernel for them.
OrtStatus* add_selective_scan(OrtCustomOpDomain* domain, const OrtApi& api);
OrtStatus* add_matmul(OrtCustomOpDomain* domain, const OrtApi& api);
OrtStatus* add_attention(OrtCustomOpDomain* domain, const OrtApi& api);
OrtStatus* add_quantised(OrtCustomOpDomain* domain, const OrtApi& api);
OrtStatus* add_conv(OrtCustomOpDomain* domain, const OrtApi& api);
OrtStatus* add_winograd(OrtCustomOpDomain* domain, const OrtApi& api);
OrtStatus* add_resnet(OrtCustomOpDomain* domain, const OrtApi& api);
