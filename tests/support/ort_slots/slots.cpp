// A library of operators that calls every entry of c_api.h and notes the entry's name. ONNX Runtime notes, by calling
// them, the members of OrtCustomOp. What an entry gives is checked here or shows in the outputs.
#include <stdio.h>
#include <string.h>

#include <mutex>
#include <set>
#include <string>

#include "onnxruntime/c_api.h"

namespace {

std::mutex mutex;
std::set<std::string>* called = new std::set<std::string>;  // never destroyed: ONNX Runtime may call at exit
std::string version;

void note(const char* name) {
  std::lock_guard<std::mutex> lock(mutex);
  called->insert(name);
}

#define CALL(entry, ...) (note(#entry), api->entry(__VA_ARGS__))
#define TRY(entry, ...) \
  if (OrtStatus* status = CALL(entry, __VA_ARGS__)) return status
#define FAIL_IF(condition) \
  if (condition) return CALL(CreateStatus, ORT_FAIL, "ort_slots: " #condition)

constexpr OrtCharacteristic kVariadic = OrtCharacteristic(2);

struct Kernel {
  const OrtApi* api;
  float scale = 0, constant = 0;
  int64_t offset = 0;
};

OrtStatus* read(const OrtApi* api, const OrtValue* value, float** data, int64_t (&sizes)[2]) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  size_t rank = 0;
  void* bytes = nullptr;
  TRY(GetTensorTypeAndShape, value, &info);
  TRY(GetDimensionsCount, info, &rank);
  FAIL_IF(rank != 2);
  TRY(GetDimensions, info, sizes, rank);
  CALL(ReleaseTensorTypeAndShapeInfo, info);
  TRY(GetTensorMutableData, const_cast<OrtValue*>(value), &bytes);
  *data = static_cast<float*>(bytes);
  return nullptr;
}

// y = x · scale + offset + c, for the attributes scale and offset and a constant c; refuses a negative offset.
struct Affine {
  static OrtStatus* create(const OrtApi* api, const OrtKernelInfo* info, Kernel* kernel) {
    TRY(KernelInfoGetAttribute_float, info, "scale", &kernel->scale);
    TRY(KernelInfoGetAttribute_int64, info, "offset", &kernel->offset);
    int is_constant = -1;
    const OrtValue* value = nullptr;
    TRY(KernelInfoGetConstantInput_tensor, info, 0, &is_constant, &value);
    FAIL_IF(is_constant != 0);
    TRY(KernelInfoGetConstantInput_tensor, info, 1, &is_constant, &value);
    FAIL_IF(is_constant != 1);
    float* data = nullptr;
    int64_t sizes[2] = {};
    if (OrtStatus* status = read(api, value, &data, sizes)) return status;
    kernel->constant = *data;
    return nullptr;
  }

  struct Call {
    const Kernel* kernel;
    const float* x;
    float* y;
  };

  static void element(void* argument, size_t i) {
    const Call& call = *static_cast<Call*>(argument);
    call.y[i] += call.x[i] * call.kernel->scale + float(call.kernel->offset) + call.kernel->constant;
  }

  static OrtStatus* compute(const Kernel* kernel, OrtKernelContext* context) {
    const OrtApi* api = kernel->api;
    if (kernel->offset < 0) return CALL(CreateStatus, ORT_INVALID_ARGUMENT, "ort_slots: a negative offset");
    const OrtValue* value = nullptr;
    float *x = nullptr, *y = nullptr;
    int64_t sizes[2] = {}, given[2] = {};
    TRY(KernelContext_GetInput, context, 0, &value);
    if (OrtStatus* status = read(api, value, &x, sizes)) return status;
    OrtValue* output = nullptr;
    TRY(KernelContext_GetOutput, context, 0, sizes, 2, &output);
    if (OrtStatus* status = read(api, output, &y, given)) return status;
    FAIL_IF(memcmp(given, sizes, sizeof sizes) != 0);
    void* stream = &mutex;  // an address that no CPU's node can be given
    TRY(KernelContext_GetGPUComputeStream, context, &stream);
    FAIL_IF(stream != nullptr);
    const size_t count = size_t(sizes[0] * sizes[1]);
    memset(y, 0, count * sizeof *y);
    Call call = {kernel, x, y};
    TRY(KernelContext_ParallelFor, context, element, count, count, &call);
    return nullptr;
  }
};

// Each output is a copy of one input; as many of both as the node has.
struct Copies {
  static OrtStatus* create(const OrtApi*, const OrtKernelInfo*, Kernel*) { return nullptr; }

  static OrtStatus* compute(const Kernel* kernel, OrtKernelContext* context) {
    const OrtApi* api = kernel->api;
    for (size_t i = 0; i < 2; ++i) {
      const OrtValue* value = nullptr;
      OrtValue* output = nullptr;
      float *x = nullptr, *y = nullptr;
      int64_t sizes[2] = {};
      TRY(KernelContext_GetInput, context, i, &value);
      if (OrtStatus* status = read(api, value, &x, sizes)) return status;
      TRY(KernelContext_GetOutput, context, i, sizes, 2, &output);
      if (OrtStatus* status = read(api, output, &y, sizes)) return status;
      memcpy(y, x, size_t(sizes[0] * sizes[1]) * sizeof *x);
    }
    return nullptr;
  }
};

template <typename T>
OrtCustomOp op(const char* (*name)(const OrtCustomOp*), size_t (*inputs)(const OrtCustomOp*), bool variadic) {
  OrtCustomOp made = {};
  made.version = kOrtApiVersion;
  made.GetName = name;
  made.GetInputTypeCount = inputs;
  made.GetExecutionProviderType = [](const OrtCustomOp*) {
    note("GetExecutionProviderType");
    return "CPUExecutionProvider";
  };
  made.GetInputType = [](const OrtCustomOp*, size_t) {
    note("GetInputType");
    return ORT_FLOAT;
  };
  made.GetOutputType = [](const OrtCustomOp*, size_t) {
    note("GetOutputType");
    return ORT_FLOAT;
  };
  made.GetOutputTypeCount = [](const OrtCustomOp*) {
    note("GetOutputTypeCount");
    return size_t(1);
  };
  if (variadic) {
    made.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return kVariadic; };
    made.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return kVariadic; };
  } else {
    made.GetInputCharacteristic = [](const OrtCustomOp*, size_t) {
      note("GetInputCharacteristic");
      return ORT_REQUIRED;
    };
    made.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) {
      note("GetOutputCharacteristic");
      return ORT_REQUIRED;
    };
  }
  made.GetInputMemoryType = [](const OrtCustomOp*, size_t) {
    note("GetInputMemoryType");
    return ORT_MEM_DEFAULT;
  };
  made.GetVariadicInputMinArity = [](const OrtCustomOp*) {
    note("GetVariadicInputMinArity");
    return 1;
  };
  made.GetVariadicInputHomogeneity = [](const OrtCustomOp*) {
    note("GetVariadicInputHomogeneity");
    return 1;
  };
  made.GetVariadicOutputMinArity = [](const OrtCustomOp*) {
    note("GetVariadicOutputMinArity");
    return 1;
  };
  made.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) {
    note("GetVariadicOutputHomogeneity");
    return 1;
  };
  made.GetStartVersion = [](const OrtCustomOp*) {
    note("GetStartVersion");
    return 1;
  };
  made.GetEndVersion = [](const OrtCustomOp*) {
    note("GetEndVersion");
    return 1;
  };
  made.InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext*) -> OrtStatus* {
    note("InferOutputShapeFn");
    return nullptr;
  };
  made.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** out) {
    note("CreateKernelV2");
    Kernel* kernel = new Kernel{api};
    *out = kernel;
    return T::create(api, info, kernel);
  };
  made.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    note("KernelComputeV2");
    return T::compute(static_cast<Kernel*>(kernel), context);
  };
  made.KernelDestroy = [](void* kernel) {
    note("KernelDestroy");
    delete static_cast<Kernel*>(kernel);
  };
  return made;
}

const char* affine_name(const OrtCustomOp*) {
  note("GetName");
  return "Affine";
}
const char* copies_name(const OrtCustomOp*) { return "Copies"; }
size_t two(const OrtCustomOp*) {
  note("GetInputTypeCount");
  return 2;
}
size_t one(const OrtCustomOp*) { return 1; }

const OrtCustomOp affine = op<Affine>(affine_name, two, false), copies = op<Copies>(copies_name, one, true);

}  // namespace

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  note("GetApi");
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  note("GetVersionString");
  version = base->GetVersionString();
  OrtCustomOpDomain* domain = nullptr;
  TRY(CreateCustomOpDomain, "slots", &domain);
  TRY(CustomOpDomain_Add, domain, &affine);
  TRY(CustomOpDomain_Add, domain, &copies);
  TRY(AddCustomOpDomain, options, domain);
  return nullptr;
}

extern "C" const char* slots_version() { return version.c_str(); }

// The names, each on a line; of one call at a time.
extern "C" const char* slots_called() {
  static std::string lines;
  std::lock_guard<std::mutex> lock(mutex);
  lines.clear();
  for (const std::string& name : *called) lines += name + "\n";
  return lines.c_str();
}
