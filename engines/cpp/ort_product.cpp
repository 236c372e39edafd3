// mdnet::BFloat16MatMul and its transposed forms for ONNX Runtime on the CPU (engines/product_op.py).
#include <stdlib.h>

#include <initializer_list>

#include "ort_tensor.h"
#include "product.h"

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

// The matrices of an input: all axes but the last two count them.
struct Matrices {
  const void* data;
  Shape shape;

  bool readable() const { return shape.rank >= 2 && shape.rank <= kMaxRank; }
  int64_t rows(bool transposed) const { return shape.sizes[shape.rank - (transposed ? 1 : 2)]; }
  int64_t columns(bool transposed) const { return shape.sizes[shape.rank - (transposed ? 2 : 1)]; }
  // The size of an axis, counted from the last one that counts matrices; 1 before the first.
  int64_t axis(size_t back) const { return back + 2 < shape.rank ? shape.sizes[shape.rank - 3 - back] : 1; }
  size_t axes() const {  // without those of size 1 in front
    size_t count = shape.rank - 2;
    while (count && axis(count - 1) == 1) --count;
    return count;
  }
  int64_t count() const {
    int64_t product = 1;
    for (size_t i = 0; i < axes(); ++i) product *= axis(i);
    return product;
  }
};

constexpr const char* kSides[2] = {"a", "b"};

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
  const Matrices& more = a.axes() > b.axes() ? a : b;
  const Matrices& fewer = a.axes() > b.axes() ? b : a;
  Shape y = {{}, a.shape.rank > b.shape.rank ? a.shape.rank : b.shape.rank};
  int64_t elements = 1;
  for (size_t i = 0; i + 2 < y.rank; ++i) {
    if (i < fewer.axes() && fewer.axis(i) != more.axis(i)) {
      return refuse(kernel, "the matrices of one input must be as many as the other's, or as its last axes say");
    }
    elements *= y.sizes[y.rank - 3 - i] = more.axis(i);
  }
  elements *= y.sizes[y.rank - 2] = a.rows(transposed[0]);
  elements *= y.sizes[y.rank - 1] = b.columns(transposed[1]);
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
  call.batch = more.count();
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

OrtStatus* pack_constant(Kernel& kernel, const OrtKernelInfo* info, int side) {
  int constant = 0;
  const OrtValue* value = nullptr;
  MDNET_TRY(kernel.api->KernelInfoGetConstantInput_tensor(info, size_t(side), &constant, &value));
  if (!constant) return nullptr;
  Matrices matrices;
  MDNET_TRY(read_value(*kernel.api, value, &matrices.data, &matrices.shape));
  if (!matrices.readable()) return refuse(kernel, "a and b must have 2 to 8 axes");
  const bool transposed = kernel.op->transposed[side];
  const int64_t rows = matrices.rows(transposed), columns = matrices.columns(transposed), count = matrices.count();
  if (!rows || !columns || !count) return nullptr;  // nothing will read it
  MdnetProduct call = {};
  call.batch = call.a_matrices = call.b_matrices = count;
  call.rows = side ? 1 : rows;
  call.inner = side ? rows : columns;
  call.columns = side ? columns : 1;
  (side ? call.b : call.a) = static_cast<const float*>(matrices.data);
  call.a_transposed = call.b_transposed = transposed;
  kernel.packed[side] = mdnet_product_pack(&call, side);
  return kernel.packed[side] ? nullptr : refuse(kernel, "no memory for a constant");
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
    if (OrtStatus* status = pack_constant(*kept, info, side)) {
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
