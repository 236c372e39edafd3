// mdnet::DepthwiseConvSilu and mdnet::ImageConv for ONNX Runtime on the CPU (mdnet_engines/conv_op.py).
#include "conv/conv.h"

#include <stdlib.h>

#include "onnxruntime/tensor.h"

namespace {

struct Operator : OrtCustomOp {
  const char* name;
  const char* attributes[2];  // numbers that must not be negative; null where there is none
};

const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

struct Kernel {
  const OrtApi* api;
  const Operator* op;
  int64_t attributes[2];
};

OrtStatus* refuse(const Kernel& kernel, const char* problem) {
  char message[160];
  snprintf(message, sizeof message, "%s: %s", kernel.op->name, problem);
  return kernel.api->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

OrtStatus* explain(const Kernel& kernel, const Pool& pool, int status) {
  if (pool.status || status == MDNET_OK) return pool.status;
  return refuse(kernel, status == MDNET_NO_MEMORY ? "no memory" : "sizes out of range");
}

enum Input { kX, kW, kBias, kInputs };

struct Inputs {
  const float* data[kInputs];
  Shape shapes[kInputs];

  OrtStatus* read(const Kernel& kernel, OrtKernelContext* context) {
    for (size_t i = 0; i < kInputs; ++i) {
      const void* values = nullptr;
      MDNET_TRY(read_input(*kernel.api, context, i, &values, &shapes[i]));
      data[i] = static_cast<const float*>(values);
    }
    const Shape &w = shapes[kW], &bias = shapes[kBias];
    if (!w.rank || bias.rank != 1 || bias.sizes[0] != w.sizes[0]) {
      return refuse(kernel, "bias must have an element for each channel of w");
    }
    return nullptr;
  }
};

OrtStatus* make_output(const Kernel& kernel, OrtKernelContext* context, const int64_t* sizes, size_t rank, float** y) {
  OrtValue* value = nullptr;
  void* data = nullptr;
  MDNET_TRY(kernel.api->KernelContext_GetOutput(context, 0, sizes, rank, &value));
  MDNET_TRY(kernel.api->GetTensorMutableData(value, &data));
  *y = static_cast<float*>(data);
  return nullptr;
}

OrtStatus* conv_silu(void* pointer, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(pointer);
  const int64_t group = kernel.attributes[0], before = kernel.attributes[1];
  Inputs inputs;
  MDNET_TRY(inputs.read(kernel, context));
  const Shape &x = inputs.shapes[kX], &w = inputs.shapes[kW];
  if (x.rank != 3 || x.sizes[1] != group) {
    return refuse(kernel, "x must have 3 axes: batch, as many channels as group says, length");
  }
  if (w.rank != 3 || w.sizes[0] != group || w.sizes[1] != 1 || w.sizes[2] <= before) {
    return refuse(kernel, "w must have 3 axes: channels, 1, more taps than lie before a step");
  }
  MdnetConvSilu call = {};
  MDNET_TRY(make_output(kernel, context, x.sizes, 3, &call.y));
  if (!x.sizes[0] || !x.sizes[1] || !x.sizes[2]) return nullptr;
  call.rows = x.sizes[0] * x.sizes[1];
  call.channels = x.sizes[1];
  call.length = x.sizes[2];
  call.taps = w.sizes[2];
  call.before = before;
  call.x = inputs.data[kX];
  call.w = inputs.data[kW];
  call.bias = inputs.data[kBias];
  Pool pool{*kernel.api, context, nullptr};
  const int status = mdnet_conv_silu(&call, Pool::parallel_for, &pool);
  return explain(kernel, pool, status);
}

OrtStatus* image_conv(void* pointer, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(pointer);
  const int64_t pad = kernel.attributes[0];
  Inputs inputs;
  MDNET_TRY(inputs.read(kernel, context));
  const Shape &x = inputs.shapes[kX], &w = inputs.shapes[kW];
  if (x.rank != 4 || w.rank != 4 || x.sizes[3] != w.sizes[1]) {
    return refuse(kernel, "x must have 4 axes: batch, height, width, channels; w outputs, channels, height, width");
  }
  const int64_t height = x.sizes[1] + 2 * pad - w.sizes[2] + 1, width = x.sizes[2] + 2 * pad - w.sizes[3] + 1;
  if (height < 1 || width < 1) return refuse(kernel, "x is smaller than w");
  MdnetImageConv call = {};
  const int64_t sizes[4] = {x.sizes[0], height, width, w.sizes[0]};
  MDNET_TRY(make_output(kernel, context, sizes, 4, &call.y));
  if (!sizes[0] || !sizes[3]) return nullptr;
  call.batch = x.sizes[0];
  call.height = x.sizes[1];
  call.width = x.sizes[2];
  call.channels = x.sizes[3];
  call.outputs = w.sizes[0];
  call.kernel_height = w.sizes[2];
  call.kernel_width = w.sizes[3];
  call.pad = pad;
  call.x = inputs.data[kX];
  call.w = inputs.data[kW];
  call.bias = inputs.data[kBias];
  Pool pool{*kernel.api, context, nullptr};
  const int status = mdnet_image_conv(&call, Pool::parallel_for, &pool);
  return explain(kernel, pool, status);
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  Kernel made = {api, &self(op), {}};
  for (int i = 0; i < 2; ++i) {
    const char* name = made.op->attributes[i];
    if (!name) continue;
    MDNET_TRY(api->KernelInfoGetAttribute_int64(info, name, &made.attributes[i]));
    if (made.attributes[i] < 0) return refuse(made, "an attribute is negative");
  }
  Kernel* kept = static_cast<Kernel*>(malloc(sizeof made));
  if (!kept) return refuse(made, "no memory");
  *kept = made;
  *kernel = kept;
  return nullptr;
}

Operator describe(const char* name, const char* first, const char* second,
                  OrtStatus* (*compute)(void* kernel, OrtKernelContext* context)) {
  Operator op = {};
  static_cast<OrtCustomOp&>(op) = plain_operator();
  op.name = name;
  op.attributes[0] = first;
  op.attributes[1] = second;
  op.GetName = [](const OrtCustomOp* op) { return self(op).name; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(kInputs); };
  op.GetInputType = op.GetOutputType = [](const OrtCustomOp*, size_t) { return ORT_FLOAT; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = free;
  return op;
}

Operator operators[2];  // sessions keep pointers to them

}  // namespace

OrtStatus* mdnet_add_convs(const OrtApi& api, OrtCustomOpDomain* domain) {
  operators[0] = describe("DepthwiseConvSilu", "group", "before", conv_silu);
  operators[1] = describe("ImageConv", "pad", nullptr, image_conv);
  for (Operator& op : operators) MDNET_TRY(api.CustomOpDomain_Add(domain, &op));
  return nullptr;
}
