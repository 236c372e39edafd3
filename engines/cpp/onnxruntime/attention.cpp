// mdnet::BFloat16Attention for ONNX Runtime on the CPU (mdnet_engines/product_op.py).
#include "attention/attention.h"

#include <stdlib.h>

#include <initializer_list>

#include "onnxruntime/matrices.h"

namespace {

enum Input { kQ, kK, kV, kInputs };

// Constant keys and values are packed once, when the session is made.
struct Kernel {
  const OrtApi* api;
  void* packed[kInputs];
};

OrtStatus* refuse(const Kernel& kernel, const char* problem) {
  char message[160];
  snprintf(message, sizeof message, "BFloat16Attention: %s", problem);
  return kernel.api->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

constexpr const char* kRank = "q, k and v must have 2 to 8 axes";

OrtStatus* compute(void* pointer, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(pointer);
  const OrtApi& api = *kernel.api;
  Matrices inputs[kInputs];
  for (size_t i = 0; i < kInputs; ++i) {
    MDNET_TRY(read_input(api, context, i, &inputs[i].data, &inputs[i].shape));
    if (!inputs[i].readable()) return refuse(kernel, kRank);
  }
  const Matrices &q = inputs[kQ], &k = inputs[kK], &v = inputs[kV];
  if (q.columns(false) != k.rows(false)) return refuse(kernel, "the inner axes of q and k differ");
  if (k.columns(false) != v.rows(false)) return refuse(kernel, "k and v have not as many keys");
  Shape y;
  MdnetAttention call = {};
  call.batch = broadcast(inputs, kInputs, &y);
  if (call.batch < 0) return refuse(kernel, kUnfit);
  call.rows = y.sizes[y.rank - 2] = q.rows(false);
  call.columns = y.sizes[y.rank - 1] = v.columns(false);
  call.keys = k.columns(false);
  call.inner = q.columns(false);
  OrtValue* output = nullptr;
  void* data = nullptr;
  MDNET_TRY(api.KernelContext_GetOutput(context, 0, y.sizes, y.rank, &output));
  MDNET_TRY(api.GetTensorMutableData(output, &data));
  if (!call.batch || !call.rows || !call.columns) return nullptr;
  if (!call.keys || !call.inner) return refuse(kernel, "there is nothing to attend to: an axis is empty");

  call.q_matrices = q.count();
  call.k_matrices = k.count();
  call.v_matrices = v.count();
  call.q = static_cast<const float*>(q.data);
  call.k = static_cast<const float*>(k.data);
  call.v = static_cast<const float*>(v.data);
  call.k_packed = kernel.packed[kK];
  call.v_packed = kernel.packed[kV];
  call.y = static_cast<float*>(data);
  Pool pool{api, context, nullptr};
  const int status = mdnet_attention(&call, Pool::parallel_for, &pool);
  if (pool.status || status == MDNET_OK) return pool.status;
  return refuse(kernel, status == MDNET_NO_MEMORY ? "no memory" : "sizes out of range");
}

void destroy(void* pointer) {
  Kernel* kernel = static_cast<Kernel*>(pointer);
  for (void* packed : kernel->packed) free(packed);
  free(kernel);
}

OrtStatus* create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  Kernel made = {api, {}};
  Kernel* kept = static_cast<Kernel*>(malloc(sizeof made));
  if (!kept) return refuse(made, "no memory");
  *kept = made;
  for (size_t i : {size_t(kK), size_t(kV)}) {
    OrtStatus* status = pack_constant(*api, info, i, false, true, &kept->packed[i]);
    if (!status) continue;
    destroy(kept);
    return status;
  }
  *kernel = kept;
  return nullptr;
}

OrtCustomOp op;  // sessions keep a pointer to it

}  // namespace

OrtStatus* mdnet_add_attention(const OrtApi& api, OrtCustomOpDomain* domain) {
  if (!mdnet_has_bfloat16()) return nullptr;  // the function body then runs
  op = plain_operator();
  op.GetName = [](const OrtCustomOp*) { return "BFloat16Attention"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(kInputs); };
  op.GetInputType = op.GetOutputType = [](const OrtCustomOp*, size_t) { return ORT_FLOAT; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = destroy;
  return api.CustomOpDomain_Add(domain, &op);
}
