// mdnet::SelectiveScan and mdnet::SelectiveScanReverse for ONNX Runtime, on the CPU and on CUDA.
//
// ONNX Runtime finds RegisterCustomOps by its name. A node of these operators then runs the kernel here, although its
// file carries a function body too.
#include "scan/scan.h"

#include <pthread.h>
#include <stdlib.h>

#include <initializer_list>

#include "onnxruntime/tensor.h"

namespace {

enum Input { kU, kDelta, kA, kB, kC, kD, kZ, kDeltaBias, kInputs };
constexpr const char* kInputNames[kInputs] = {"u", "delta", "A", "B", "C", "D", "z", "delta_bias"};

struct Operator : OrtCustomOp {
  MdnetType type;
  bool reverse, cuda;
};

const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

OrtElementType element_type(const Operator& op) {
  return op.type == MDNET_FLOAT32 ? ORT_FLOAT : op.type == MDNET_FLOAT16 ? ORT_FLOAT16 : ORT_BFLOAT16;
}

struct Kernel {
  const OrtApi* api;
  const Operator* op;
};

struct Text {
  char text[64];
};

Text text_of(const int64_t* sizes, size_t rank) {
  Text out;
  size_t used = size_t(snprintf(out.text, sizeof out.text, "("));
  for (size_t i = 0; i < rank && used < sizeof out.text; ++i) {
    used += size_t(snprintf(out.text + used, sizeof out.text - used, i ? ", %lld" : "%lld", (long long)sizes[i]));
  }
  if (used < sizeof out.text) snprintf(out.text + used, sizeof out.text - used, rank == 1 ? ",)" : ")");
  return out;
}

Text text_of(const Shape& shape) { return text_of(shape.sizes, shape.rank); }

OrtStatus* check_shapes(const OrtApi& api, const Shape (&shapes)[kInputs]) {
  const Shape &u = shapes[kU], &A = shapes[kA];
  char message[384];
  if (u.rank != 3 || A.rank != 2) {
    snprintf(
        message, sizeof message,
        "SelectiveScan: u must have 3 axes (batch, channels, length), A 2 (channels, states); they have %zu and %zu",
        u.rank, A.rank);
    return api.CreateStatus(ORT_INVALID_ARGUMENT, message);
  }
  if (!u.sizes[0] || !u.sizes[1] || !u.sizes[2] || !A.sizes[1]) {
    snprintf(message, sizeof message, "SelectiveScan: u %s or A %s has an empty axis", text_of(u).text,
             text_of(A).text);
    return api.CreateStatus(ORT_INVALID_ARGUMENT, message);
  }
  const int64_t *steps = u.sizes, channels = u.sizes[1], states = A.sizes[1];
  const int64_t mix[3] = {u.sizes[0], states, u.sizes[2]}, parameters[2] = {channels, states};
  for (int i = 0; i < kInputs; ++i) {
    const bool parameter = i == kD || i == kDeltaBias;
    const size_t rank = parameter ? 1 : i == kA ? 2 : 3;
    const int64_t* wanted = parameter || i == kA ? parameters : i == kB || i == kC ? mix : steps;
    if (shapes[i].is(rank, wanted)) continue;
    snprintf(message, sizeof message, "SelectiveScan: %s is %s, but u %s and A %s need %s", kInputNames[i],
             shapes[i].rank <= 3 ? text_of(shapes[i]).text : "of more than 3 axes", text_of(u).text, text_of(A).text,
             text_of(wanted, rank).text);
    return api.CreateStatus(ORT_INVALID_ARGUMENT, message);
  }
  return nullptr;
}

MdnetRows contiguous(const void* data, const Shape& shape) {
  return {data, shape.sizes[1] * shape.sizes[2], shape.sizes[2]};
}

OrtStatus* compute(void* pointer, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(pointer);
  const OrtApi& api = *kernel.api;
  const void* data[kInputs];
  Shape shapes[kInputs];
  for (int i = 0; i < kInputs; ++i) MDNET_TRY(read_input(api, context, size_t(i), &data[i], &shapes[i]));
  MDNET_TRY(check_shapes(api, shapes));
  OrtValue* y = nullptr;
  void* y_data = nullptr;
  MDNET_TRY(api.KernelContext_GetOutput(context, 0, shapes[kU].sizes, 3, &y));
  MDNET_TRY(api.GetTensorMutableData(y, &y_data));

  MdnetScan scan = {};
  scan.batch = shapes[kU].sizes[0];
  scan.channels = shapes[kU].sizes[1];
  scan.length = shapes[kU].sizes[2];
  scan.states = shapes[kA].sizes[1];
  scan.type = kernel.op->type;
  scan.reverse = kernel.op->reverse;
  scan.u = contiguous(data[kU], shapes[kU]);
  scan.delta = contiguous(data[kDelta], shapes[kDelta]);
  scan.z = contiguous(data[kZ], shapes[kZ]);
  scan.B = contiguous(data[kB], shapes[kB]);
  scan.C = contiguous(data[kC], shapes[kC]);
  scan.A = data[kA];
  scan.D = data[kD];
  scan.delta_bias = data[kDeltaBias];
  scan.y = y_data;

  if (kernel.op->cuda) {
    void* stream = nullptr;
    MDNET_TRY(api.KernelContext_GetGPUComputeStream(context, &stream));
    const char* problem = mdnet_scan_cuda(&scan, stream);
    return problem ? api.CreateStatus(ORT_FAIL, problem) : nullptr;
  }
  Pool pool{api, context, nullptr};
  const int status = mdnet_scan(&scan, Pool::parallel_for, &pool);
  if (pool.status) return pool.status;
  if (status == MDNET_OK) return nullptr;
  return api.CreateStatus(ORT_FAIL, status == MDNET_NO_MEMORY ? "SelectiveScan: no memory for its states"
                                                              : "SelectiveScan: sizes out of range");
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo*, void** kernel) {
  Kernel* made = static_cast<Kernel*>(malloc(sizeof(Kernel)));
  if (!made) return api->CreateStatus(ORT_FAIL, "SelectiveScan: no memory");
  *made = {api, &self(op)};
  *kernel = made;
  return nullptr;
}

Operator describe(MdnetType type, bool reverse, bool cuda) {
  Operator op = {};
  static_cast<OrtCustomOp&>(op) = plain_operator();
  op.type = type;
  op.reverse = reverse;
  op.cuda = cuda;
  op.GetName = [](const OrtCustomOp* op) { return self(op).reverse ? "SelectiveScanReverse" : "SelectiveScan"; };
  op.GetExecutionProviderType = [](const OrtCustomOp* op) {
    return self(op).cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(kInputs); };
  op.GetInputType = [](const OrtCustomOp* op, size_t i) {
    return i == kA || i == kD || i == kDeltaBias ? ORT_FLOAT : element_type(self(op));
  };
  op.GetOutputType = [](const OrtCustomOp* op, size_t) { return element_type(self(op)); };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = free;
  return op;
}

// The domain and its operators, made once in a process; sessions keep pointers to them.
Operator operators[12];
OrtCustomOpDomain* domain = nullptr;
pthread_mutex_t domain_mutex = PTHREAD_MUTEX_INITIALIZER;

OrtStatus* make_domain(const OrtApi& api) {
  OrtCustomOpDomain* made = nullptr;
  MDNET_TRY(api.CreateCustomOpDomain("mdnet", &made));
  Operator* op = operators;
  for (bool cuda : {false, true}) {
    for (bool reverse : {false, true}) {
      for (MdnetType type : {MDNET_FLOAT32, MDNET_FLOAT16, MDNET_BFLOAT16}) {
        *op = describe(type, reverse, cuda);
        MDNET_TRY(api.CustomOpDomain_Add(made, op++));
      }
    }
  }
  MDNET_TRY(mdnet_add_quantised(api, made));
  MDNET_TRY(mdnet_add_products(api, made));
  MDNET_TRY(mdnet_add_attention(api, made));
  MDNET_TRY(mdnet_add_convs(api, made));
  domain = made;
  return nullptr;
}

}  // namespace

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (!api) {  // older; every version's table starts with CreateStatus
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "the mdnet operators need ONNX Runtime 1.20 or newer");
  }
  pthread_mutex_lock(&domain_mutex);
  OrtStatus* status = domain ? nullptr : make_domain(*api);
  pthread_mutex_unlock(&domain_mutex);
  return status ? status : api->AddCustomOpDomain(options, domain);
}
