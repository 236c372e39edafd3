// mdnet::BFloat16MatMul and its transposed forms for ONNX Runtime on the CPU (mdnet_engines/product_op.py).
#include "matmul/matmul.h"

#include <stdlib.h>

#include <initializer_list>

#include "onnxruntime/matrices.h"

namespace {

struct Operator : OrtCustomOp {
  const char* name;
  bool transposed[2];
};

const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

// A constant input is packed once, when the session is made.
struct Kernel {
  const OrtApi* api;
  const Operator* op;
  void* packed[2];
};

OrtStatus* refuse(const Kernel& kernel, const char* problem) {
  char message[160];
  snprintf(message, sizeof message, "%s: %s", kernel.op->name, problem);
  return kernel.api->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

OrtStatus* compute(void* pointer, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(pointer);
  const OrtApi& api = *kernel.api;
  const bool* transposed = kernel.op->transposed;
  Matrices sides[2];
  for (size_t i : {0, 1}) {
    MDNET_TRY(read_input(api, context, i, &sides[i].data, &sides[i].shape));
    if (!sides[i].readable()) return refuse(kernel, "a and b must have 2 to 8 axes");
  }
  const Matrices &a = sides[0], &b = sides[1];
  const int64_t inner = a.columns(transposed[0]);
  if (inner != b.rows(transposed[1])) return refuse(kernel, "the inner axes of a and b differ");
  Shape y;
  const int64_t batch = broadcast(sides, 2, &y);
  if (batch < 0) return refuse(kernel, kUnfit);
  y.sizes[y.rank - 2] = a.rows(transposed[0]);
  y.sizes[y.rank - 1] = b.columns(transposed[1]);
  const int64_t elements = batch * y.sizes[y.rank - 2] * y.sizes[y.rank - 1];
  OrtValue* output = nullptr;
  void* data = nullptr;
  MDNET_TRY(api.KernelContext_GetOutput(context, 0, y.sizes, y.rank, &output));
  MDNET_TRY(api.GetTensorMutableData(output, &data));
  if (!elements) return nullptr;
  if (!inner) {
    memset(data, 0, size_t(elements) * sizeof(float));
    return nullptr;
  }

  MdnetProduct call = {};
  call.batch = batch;
  call.rows = a.rows(transposed[0]);
  call.columns = b.columns(transposed[1]);
  call.inner = inner;
  call.a_matrices = a.count();
  call.b_matrices = b.count();
  call.a = static_cast<const float*>(a.data);
  call.b = static_cast<const float*>(b.data);
  call.a_packed = kernel.packed[0];
  call.b_packed = kernel.packed[1];
  call.y = static_cast<float*>(data);
  call.a_transposed = transposed[0];
  call.b_transposed = transposed[1];
  Pool pool{api, context, nullptr};
  const int status = mdnet_product(&call, Pool::parallel_for, &pool);
  if (pool.status) return pool.status;
  if (status == MDNET_OK) return nullptr;
  return refuse(kernel, status == MDNET_NO_MEMORY ? "no memory" : "sizes out of range");
}

void destroy(void* pointer) {
  Kernel* kernel = static_cast<Kernel*>(pointer);
  for (void* packed : kernel->packed) free(packed);
  free(kernel);
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  Kernel made = {api, &self(op), {}};
  Kernel* kept = static_cast<Kernel*>(malloc(sizeof made));
  if (!kept) return refuse(made, "no memory");
  *kept = made;
  for (int side : {0, 1}) {
    if (OrtStatus* status =
            pack_constant(*api, info, size_t(side), made.op->transposed[side], side, &kept->packed[side])) {
      destroy(kept);
      return status;
    }
  }
  *kernel = kept;
  return nullptr;
}

Operator describe(const char* name, bool transposed_a, bool transposed_b) {
  Operator op = {};
  static_cast<OrtCustomOp&>(op) = plain_operator();
  op.name = name;
  op.transposed[0] = transposed_a;
  op.transposed[1] = transposed_b;
  op.GetName = [](const OrtCustomOp* op) { return self(op).name; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(2); };
  op.GetInputType = op.GetOutputType = [](const OrtCustomOp*, size_t) { return ORT_FLOAT; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = destroy;
  return op;
}

Operator operators[3];  // sessions keep pointers to them

}  // namespace

OrtStatus* mdnet_add_products(const OrtApi& api, OrtCustomOpDomain* domain) {
  if (!mdnet_has_bfloat16()) return nullptr;  // the function body then runs: float32 products of rounded values
  operators[0] = describe("BFloat16MatMul", false, false);
  operators[1] = describe("BFloat16MatMulTransposedA", true, false);
  operators[2] = describe("BFloat16MatMulTransposedB", false, true);
  for (Operator& op : operators) MDNET_TRY(api.CustomOpDomain_Add(domain, &op));
  return nullptr;
}
