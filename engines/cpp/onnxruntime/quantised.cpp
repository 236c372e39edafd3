// The operators of mdnet_engines/quantised_ops.py for ONNX Runtime on the CPU.
#include "quantised/quantised.h"

#include <stdlib.h>

#include <initializer_list>

#include "onnxruntime/tensor.h"

namespace {

struct Operator : OrtCustomOp {
  const char* name;
  const char* inputs;  // the type of each: b for uint8, f for float
  OrtElementType output;
  bool silu;

  size_t count() const { return strlen(inputs); }
  bool bytes() const { return inputs[0] == 'b'; }  // whether x is uint8
};

const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

struct Kernel {
  const OrtApi* api;
  const Operator* op;
  int64_t groups;
  float epsilon;
};

constexpr size_t kMaxInputs = 8;

// What a kernel is given.
struct Inputs {
  const void* data[kMaxInputs];
  Shape shapes[kMaxInputs];

  OrtStatus* read(const Kernel& kernel, OrtKernelContext* context) {
    for (size_t i = 0; i < kernel.op->count(); ++i) {
      MDNET_TRY(read_input(*kernel.api, context, i, &data[i], &shapes[i]));
    }
    return nullptr;
  }

  const float* floats(size_t i) const { return static_cast<const float*>(data[i]); }
  const uint8_t* bytes(size_t i) const { return static_cast<const uint8_t*>(data[i]); }

  int64_t elements(size_t i) const {
    int64_t product = 1;
    for (size_t axis = 0; axis < shapes[i].rank && axis < kMaxRank; ++axis) product *= shapes[i].sizes[axis];
    return product;
  }
};

OrtStatus* refuse(const Kernel& kernel, const char* problem) {
  char message[128];
  snprintf(message, sizeof message, "%s: %s", kernel.op->name, problem);
  return kernel.api->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

OrtStatus* explain(const Kernel& kernel, int status) {
  if (status == MDNET_OK) return nullptr;
  return refuse(kernel, status == MDNET_NO_MEMORY ? "no memory" : "sizes out of range");
}

// y, of a shape.
OrtStatus* make_output(const Kernel& kernel, OrtKernelContext* context, const Shape& shape, void** data) {
  OrtValue* y = nullptr;
  MDNET_TRY(kernel.api->KernelContext_GetOutput(context, 0, shape.sizes, shape.rank, &y));
  return kernel.api->GetTensorMutableData(y, data);
}

constexpr const char* kNotScalar = "scales and zero-points must be scalars";

OrtStatus* group_norm(void* pointer, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(pointer);
  Inputs inputs;
  MDNET_TRY(inputs.read(kernel, context));
  const Shape& x = inputs.shapes[0];
  if (x.rank != 4) return refuse(kernel, "x must have 4 axes: batch, height, width, channels");
  const int64_t channels = x.sizes[3];
  if (channels % kernel.groups) return refuse(kernel, "the channels of x can't be divided by groups");
  const size_t gamma = kernel.op->count() - 4, beta = gamma + 1;  // y's scale and zero-point are behind them
  for (size_t i = 1; i < kernel.op->count(); ++i) {
    const bool per_channel = i == gamma || i == beta;
    if (inputs.elements(i) == (per_channel ? channels : 1)) continue;
    return refuse(kernel, per_channel ? "gamma and beta need an element for each channel of x" : kNotScalar);
  }
  void* y = nullptr;
  MDNET_TRY(make_output(kernel, context, inputs.shapes[0], &y));
  if (!inputs.elements(0)) return nullptr;

  MdnetGroupNorm call = {};
  call.batch = x.sizes[0];
  call.places = x.sizes[1] * x.sizes[2];
  call.channels = channels;
  call.groups = kernel.groups;
  call.x = inputs.data[0];
  call.gamma = inputs.floats(gamma);
  call.beta = inputs.floats(beta);
  call.y = static_cast<uint8_t*>(y);
  call.bytes = kernel.op->bytes();
  call.x_scale = kernel.op->bytes() ? *inputs.floats(1) : 1;
  call.epsilon = kernel.epsilon;
  call.y_scale = *inputs.floats(beta + 1);
  call.y_zero_point = *inputs.bytes(beta + 2);
  call.silu = kernel.op->silu;
  Pool pool{*kernel.api, context, nullptr};
  const int status = mdnet_group_norm(&call, Pool::parallel_for, &pool);
  return pool.status ? pool.status : explain(kernel, status);
}

OrtStatus* residual_sum(void* pointer, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(pointer);
  Inputs inputs;
  MDNET_TRY(inputs.read(kernel, context));
  const bool a_bytes = kernel.op->bytes(), y_bytes = kernel.op->output == ORT_UINT8;
  const size_t b = a_bytes ? 3 : 1, end = b + 3 + (y_bytes ? 2 : 0);
  const Shape& a = inputs.shapes[0];
  if (a.rank > kMaxRank || !a.is(inputs.shapes[b].rank, inputs.shapes[b].sizes)) {
    return refuse(kernel, "a and b must have one shape, of 8 axes at most");
  }
  for (size_t i = 1; i < end; ++i) {
    if (i != b && inputs.elements(i) != 1) return refuse(kernel, kNotScalar);
  }
  void* y = nullptr;
  MDNET_TRY(make_output(kernel, context, a, &y));
  if (!inputs.elements(0)) return nullptr;

  MdnetResidualSum call = {};
  call.count = inputs.elements(0);
  call.a = inputs.data[0];
  call.b = inputs.bytes(b);
  call.y = y;
  call.a_bytes = a_bytes;
  call.y_bytes = y_bytes;
  call.a_scale = a_bytes ? *inputs.floats(1) : 1;
  call.a_zero_point = a_bytes ? *inputs.bytes(2) : 0;
  call.b_scale = *inputs.floats(b + 1);
  call.b_zero_point = *inputs.bytes(b + 2);
  call.y_scale = y_bytes ? *inputs.floats(b + 3) : 1;
  call.y_zero_point = y_bytes ? *inputs.bytes(b + 4) : 0;
  Pool pool{*kernel.api, context, nullptr};
  const int status = mdnet_residual_sum(&call, Pool::parallel_for, &pool);
  return pool.status ? pool.status : explain(kernel, status);
}

OrtStatus* geglu(void* pointer, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(pointer);
  Inputs inputs;
  MDNET_TRY(inputs.read(kernel, context));
  Shape shape = inputs.shapes[0];
  if (!shape.rank || shape.rank > kMaxRank) return refuse(kernel, "x must have 1 to 8 axes");
  int64_t& channels = shape.sizes[shape.rank - 1];
  if (channels % 2 || inputs.elements(3) != channels) {
    return refuse(kernel, "x must have an even number of channels, and bias as many");
  }
  for (size_t i : {1, 2, 4, 5}) {
    if (inputs.elements(i) != 1) return refuse(kernel, kNotScalar);
  }
  channels /= 2;
  void* y = nullptr;
  MDNET_TRY(make_output(kernel, context, shape, &y));
  if (!inputs.elements(0)) return nullptr;

  MdnetGeglu call = {};
  call.channels = channels;
  call.rows = inputs.elements(0) / (2 * channels);
  call.x = inputs.bytes(0);
  call.bias = inputs.floats(3);
  call.y = static_cast<uint8_t*>(y);
  call.x_scale = *inputs.floats(1);
  call.x_zero_point = *inputs.bytes(2);
  call.y_scale = *inputs.floats(4);
  call.y_zero_point = *inputs.bytes(5);
  Pool pool{*kernel.api, context, nullptr};
  const int status = mdnet_geglu(&call, Pool::parallel_for, &pool);
  return pool.status ? pool.status : explain(kernel, status);
}

OrtStatus* keep(const Kernel& made, void** kernel) {
  Kernel* kept = static_cast<Kernel*>(malloc(sizeof(Kernel)));
  if (!kept) return refuse(made, "no memory");
  *kept = made;
  *kernel = kept;
  return nullptr;
}

OrtStatus* create_group_norm(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  Kernel made = {api, &self(op), 0, 0};
  MDNET_TRY(api->KernelInfoGetAttribute_int64(info, "groups", &made.groups));
  MDNET_TRY(api->KernelInfoGetAttribute_float(info, "epsilon", &made.epsilon));
  return made.groups < 1 ? refuse(made, "groups must be at least 1") : keep(made, kernel);
}

OrtStatus* create_plain(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo*, void** kernel) {
  return keep({api, &self(op), 0, 0}, kernel);
}

Operator describe(const char* name, const char* inputs, bool silu) {
  Operator op = {};
  static_cast<OrtCustomOp&>(op) = plain_operator();
  op.name = name;
  op.inputs = inputs;
  op.output = ORT_UINT8;
  op.silu = silu;
  op.GetName = [](const OrtCustomOp* op) { return self(op).name; };
  op.GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).count(); };
  op.GetInputType = [](const OrtCustomOp* op, size_t i) { return self(op).inputs[i] == 'b' ? ORT_UINT8 : ORT_FLOAT; };
  op.GetOutputType = [](const OrtCustomOp* op, size_t) { return self(op).output; };
  op.CreateKernelV2 = create_group_norm;
  op.KernelComputeV2 = group_norm;
  op.KernelDestroy = free;
  return op;
}

Operator operators[9];  // sessions keep pointers to them

}  // namespace

OrtStatus* mdnet_add_quantised(const OrtApi& api, OrtCustomOpDomain* domain) {
  operators[0] = describe("QLinearGroupNorm", "bfbfffb", false);
  operators[1] = describe("QLinearGroupNormSilu", "bfbfffb", true);
  operators[2] = describe("GroupNormQuantize", "ffffb", false);
  operators[3] = describe("GroupNormSiluQuantize", "ffffb", true);
  operators[4] = describe("ResidualSum", "fbfb", false);
  operators[5] = describe("QLinearResidualSum", "bfbbfb", false);
  operators[6] = describe("ResidualSumQuantize", "fbfbfb", false);
  operators[7] = describe("QLinearResidualSumQuantize", "bfbbfbfb", false);
  operators[8] = describe("QLinearGeglu", "bfbffb", false);
  for (int i : {4, 5}) operators[i].output = ORT_FLOAT;
  for (int i : {4, 5, 6, 7, 8}) operators[i].CreateKernelV2 = create_plain;
  for (int i : {4, 5, 6, 7}) operators[i].KernelComputeV2 = residual_sum;
  operators[8].KernelComputeV2 = geglu;
  for (Operator& op : operators) MDNET_TRY(api.CustomOpDomain_Add(domain, &op));
  return nullptr;
}
