// mdnet::DepthwiseConvSilu and mdnet::ImageConv.
#include "conv/conv.h"

#include "onnxruntime/op.h"

namespace {

enum Input { kX, kW, kBias, kInputs };

struct Convolution : Node {
  OrtStatus* attribute(const OrtKernelInfo* info, const char* attribute, int64_t* value) const {
    MDNET_TRY(api.KernelInfoGetAttribute_int64(info, attribute, value));
    return *value < 0 ? refuse("%s is negative", attribute) : nullptr;
  }

  OrtStatus* read(const Run& run, Tensor (&inputs)[kInputs]) const {
    MDNET_TRY(run.inputs(inputs));
    const Shape &w = inputs[kW].shape, &bias = inputs[kBias].shape;
    if (w.rank && bias.is(1, w.sizes)) return nullptr;
    return refuse("bias must have an element for each channel of w");
  }
};

struct DepthwiseConvSilu : Convolution {
  int64_t group = 0, before = 0;

  OrtStatus* prepare(const OrtKernelInfo* info) {
    MDNET_TRY(attribute(info, "group", &group));
    return attribute(info, "before", &before);
  }

  OrtStatus* compute(Run& run) const {
    Tensor inputs[kInputs];
    MDNET_TRY(read(run, inputs));
    const Shape &x = inputs[kX].shape, &w = inputs[kW].shape;
    if (x.rank != 3 || x.sizes[1] != group) {
      return refuse("x must have 3 axes: batch, as many channels as group says, length");
    }
    if (w.rank != 3 || w.sizes[0] != group || w.sizes[1] != 1 || w.sizes[2] <= before) {
      return refuse("w must have 3 axes: channels, 1, more taps than lie before a step");
    }
    MdnetDepthwiseConvSilu call = {};
    MDNET_TRY(run.output(x.sizes, x.rank, &call.y));
    if (!x.elements()) return nullptr;
    call.rows = x.sizes[0] * x.sizes[1];
    call.channels = x.sizes[1];
    call.length = x.sizes[2];
    call.taps = w.sizes[2];
    call.before = before;
    call.x = inputs[kX].floats();
    call.w = inputs[kW].floats();
    call.bias = inputs[kBias].floats();
    return run.on_threads(mdnet_depthwise_conv_silu, call);
  }
};

struct ImageConv : Convolution {
  int64_t pad = 0;

  OrtStatus* prepare(const OrtKernelInfo* info) { return attribute(info, "pad", &pad); }

  OrtStatus* compute(Run& run) const {
    Tensor inputs[kInputs];
    MDNET_TRY(read(run, inputs));
    const Shape &x = inputs[kX].shape, &w = inputs[kW].shape;
    if (x.rank != 4 || w.rank != 4 || x.sizes[3] != w.sizes[1]) {
      return refuse("x must have 4 axes: batch, height, width, channels; w outputs, channels, height, width");
    }
    const int64_t height = x.sizes[1] + 2 * pad - w.sizes[2] + 1, width = x.sizes[2] + 2 * pad - w.sizes[3] + 1;
    if (height < 1 || width < 1) return refuse("x is smaller than w");
    const int64_t sizes[4] = {x.sizes[0], height, width, w.sizes[0]};
    MdnetImageConv call = {};
    MDNET_TRY(run.output(sizes, 4, &call.y));
    if (!sizes[0] || !sizes[3]) return nullptr;
    call.batch = x.sizes[0];
    call.height = x.sizes[1];
    call.width = x.sizes[2];
    call.channels = x.sizes[3];
    call.outputs = w.sizes[0];
    call.kernel_height = w.sizes[2];
    call.kernel_width = w.sizes[3];
    call.pad = pad;
    call.x = inputs[kX].floats();
    call.w = inputs[kW].floats();
    call.bias = inputs[kBias].floats();
    return run.on_threads(mdnet_image_conv, call);
  }
};

const Op<DepthwiseConvSilu> depthwise[] = {{"DepthwiseConvSilu", "fff", 'f'}};
const Op<ImageConv> image[] = {{"ImageConv", "fff", 'f'}};

}  // namespace

OrtStatus* add_conv(OrtCustomOpDomain* domain, const OrtApi& api) {
  MDNET_TRY(add_to(domain, api, depthwise));
  return add_to(domain, api, image);
}
