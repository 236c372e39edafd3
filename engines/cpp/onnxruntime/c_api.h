// The part of ONNX Runtime's C interface that this library uses, declared here because its headers come with no Python
// or Debian package. The interface is a table of functions that only ever grows at its end, so an entry's place is
// fixed; places and types are those of onnxruntime_c_api.h, API version 20 (ONNX Runtime 1.20).
#pragma once

#include <stddef.h>
#include <stdint.h>

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

constexpr uint32_t kOrtApiVersion = 20;

enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum OrtElementType { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_FLOAT16 = 10, ORT_BFLOAT16 = 16 };
enum OrtCharacteristic { ORT_REQUIRED = 0 };
enum OrtMemType { ORT_MEM_DEFAULT = 0 };

// The table. Only entries in use have a name; `Skip<n>` stands for n others.
template <int n>
struct Skip {
  void* entries[n];
};

struct OrtApi {
  OrtStatus* (*CreateStatus)(OrtErrorCode code, const char* message);  // 0; copies the message
  Skip<25> skip1;
  OrtStatus* (*CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain** out);            // 26
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, const struct OrtCustomOp* op);  // 27
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);     // 28
  Skip<22> skip2;
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** out);  // 51
  Skip<9> skip3;
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);                   // 61
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dimensions, size_t count);  // 62
  Skip<2> skip4;
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** out);  // 65
  Skip<19> skip5;
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name, float* out);    // 85
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name, int64_t* out);  // 86
  Skip<3> skip6;
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index, const OrtValue** out);  // 90
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* dimensions,
                                        size_t count, OrtValue** out);  // 91
  Skip<7> skip7;
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);  // 99
  Skip<93> skip8;
  OrtStatus* (*KernelContext_GetGPUComputeStream)(const OrtKernelContext* context, void** out);  // 193
  Skip<55> skip9;
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo* info, size_t index, int* is_constant,
                                                  const OrtValue** out);  // 249
  Skip<24> skip10;
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context, void (*task)(void* argument, size_t i),
                                          size_t count, size_t batches, void* argument);  // 274
};

#define MDNET_AT(entry, place) static_assert(offsetof(OrtApi, entry) == (place) * sizeof(void*), #entry)
MDNET_AT(AddCustomOpDomain, 28);
MDNET_AT(GetTensorMutableData, 51);
MDNET_AT(GetDimensions, 62);
MDNET_AT(GetTensorTypeAndShape, 65);
MDNET_AT(KernelInfoGetAttribute_int64, 86);
MDNET_AT(KernelContext_GetOutput, 91);
MDNET_AT(ReleaseTensorTypeAndShapeInfo, 99);
MDNET_AT(KernelContext_GetGPUComputeStream, 193);
MDNET_AT(KernelInfoGetConstantInput_tensor, 249);
MDNET_AT(KernelContext_ParallelFor, 274);
#undef MDNET_AT

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// What an operator is, and what its kernel does. Members that stay null are optional or replaced by their V2.
struct OrtCustomOp {
  uint32_t version;
  void* CreateKernel;
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  OrtElementType (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  OrtElementType (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  void* KernelCompute;
  void (*KernelDestroy)(void* kernel);
  OrtCharacteristic (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
  OrtCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext* context);
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
  void* GetMayInplace;
  void* ReleaseMayInplace;
  void* GetAliasMap;
  void* ReleaseAliasMap;
};
