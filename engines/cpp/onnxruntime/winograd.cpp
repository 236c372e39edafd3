// mdnet::WinogradConvQuantize, and WinogradConvSum and the others, which add a residual: from bytes and int8 weights.
#include "winograd/winograd.h"

#include "onnxruntime/op.h"

namespace {

enum Input { kX, kXScale, kXZeroPoint, kW, kWScale, kBias, kYScale, kYZeroPoint, kSummed };
constexpr size_t kMaxInputs = 13;

// Flags: which inputs there are behind kYZeroPoint.
constexpr int kSum = 1, kSumOfBytes = 2, kQuantize = 4;

struct WinogradConv : Node {
  MdnetWinogradWeights* weights = nullptr;
  int64_t channels = 0, outputs = 0;

  ~WinogradConv() { free(weights); }

  OrtStatus* constant(const OrtKernelInfo* info, size_t input, Tensor* tensor) const {
    int constant = 0;
    const OrtValue* value = nullptr;
    MDNET_TRY(api.KernelInfoGetConstantInput_tensor(info, input, &constant, &value));
    return constant ? tensor->read(api, value) : refuse("w and w_scale must be constants");
  }

  OrtStatus* prepare(const OrtKernelInfo* info) {
    Tensor w, scale;
    MDNET_TRY(constant(info, kW, &w));
    MDNET_TRY(constant(info, kWScale, &scale));
    const int64_t* sizes = w.shape.sizes;
    if (w.shape.rank != 4 || sizes[2] != 3 || sizes[3] != 3) return refuse("w must be outputs x channels x 3 x 3");
    if (!scale.shape.is(1, sizes)) return refuse("w_scale must have an element for each output");
    outputs = sizes[0];
    channels = sizes[1];
    if (!w.shape.elements()) return refuse("w has an empty axis");
    const int32_t products = mdnet_winograd_products();
    int64_t keep_bytes = 0;
    MDNET_TRY(api.KernelInfoGetAttribute_int64(info, "keep_bytes", &keep_bytes));
    if (keep_bytes) {
      weights = mdnet_winograd_pack_bytes(static_cast<const int8_t*>(w.data), scale.floats(), channels, outputs,
                                          products, MDNET_BEST);
      return weights ? nullptr : refuse("no memory");
    }
    float* floats = static_cast<float*>(malloc(size_t(w.shape.elements()) * sizeof(float)));
    if (!floats) return refuse("no memory");
    const int8_t* values = static_cast<const int8_t*>(w.data);
    for (int64_t i = 0; i < w.shape.elements(); ++i) floats[i] = values[i] * scale.floats()[i / (channels * 9)];
    weights = mdnet_winograd_pack(floats, channels, outputs, products, MDNET_BEST);
    free(floats);
    return weights ? nullptr : refuse("no memory");
  }

  OrtStatus* compute(Run& run) const {
    Tensor inputs[kMaxInputs];
    MDNET_TRY(run.inputs(inputs));
    const Shape& x = inputs[kX].shape;
    if (x.rank != 4 || x.sizes[3] != channels) {
      return refuse("x must have 4 axes: batch, height, width, as many channels as w");
    }
    const int64_t sizes[4] = {x.sizes[0], x.sizes[1], x.sizes[2], outputs};
    if (!inputs[kBias].shape.is(1, sizes + 3)) return refuse("bias must have an element for each output");
    for (size_t i = 1; op.inputs[i]; ++i) {
      if (i == kW || i == kWScale || i == kBias || i == kSummed) continue;
      if (inputs[i].shape.elements() != 1) return refuse("scales and zero-points must be scalars");
    }
    MdnetWinograd call = {};
    call.x = inputs[kX].data;
    call.x_is_uint8 = 1;
    call.x_scale = *inputs[kXScale].floats();
    call.x_zero_point = *inputs[kXZeroPoint].bytes();
    call.bias = inputs[kBias].floats();
    // A sum that is quantised has the scale of what is added to it too; it is not rounded to that.
    size_t last = kYScale;
    if (op.flags & kSum) {
      if (!inputs[kSummed].shape.is(4, sizes)) return refuse("a must have the shape of y");
      call.residual = inputs[kSummed].data;
      last = kSummed + 1;
      if (op.flags & kSumOfBytes) {
        call.residual_is_uint8 = 1;
        call.residual_scale = *inputs[last].floats();
        call.residual_zero_point = *inputs[last + 1].bytes();
        last += 2;
      }
    }
    if (op.flags & kQuantize) {
      call.y_is_uint8 = 1;
      call.y_scale = *inputs[last].floats();
      call.y_zero_point = *inputs[last + 1].bytes();
    }
    MDNET_TRY(run.output(sizes, 4, &call.y));
    if (!x.elements()) return nullptr;
    call.batch = sizes[0];
    call.height = sizes[1];
    call.width = sizes[2];
    call.weights = weights;
    return run.on_threads(mdnet_winograd, call);
  }
};

const Op<WinogradConv> operators[] = {
    {"WinogradConvQuantize", "bfbcfffb", 'b', kQuantize},
    {"WinogradConvSum", "bfbcfffbf", 'f', kSum},
    {"WinogradConvSumQuantize", "bfbcfffbffb", 'b', kSum | kQuantize},
    {"WinogradConvQLinearSum", "bfbcfffbbfb", 'f', kSum | kSumOfBytes},
    {"WinogradConvQLinearSumQuantize", "bfbcfffbbfbfb", 'b', kSum | kSumOfBytes | kQuantize},
};

}  // namespace

OrtStatus* add_winograd(OrtCustomOpDomain* domain, const OrtApi& api) {
  if (mdnet_winograd_products() < 0)
    return nullptr;  // the function body then runs: ONNX Runtime's convolution of bytes
  return add_to(domain, api, operators);
}
