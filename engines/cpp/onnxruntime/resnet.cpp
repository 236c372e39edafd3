// mdnet::GroupNormSiluConv and mdnet::GroupNormSiluConvSum: the convolutions of a ResNet block in float32.
#include "common/buffer.h"
#include "onnxruntime/op.h"
#include "quantised/quantised.h"
#include "winograd/winograd.h"

namespace {

enum Input { kX, kGamma, kBeta, kW, kBias, kResidual, kInputs };
constexpr int kSum = 1;

MdnetWinogradWeights* packed(const Tensor& w) {
  return mdnet_winograd_pack(w.floats(), w.shape.sizes[1], w.shape.sizes[0], MDNET_WINOGRAD_FLOAT32, MDNET_BEST);
}

bool is_filter(const Shape& w) {
  return w.rank == 4 && w.sizes[0] > 0 && w.sizes[1] > 0 && w.sizes[2] == 3 && w.sizes[3] == 3;
}

struct GroupNormSiluConv : Node {
  int64_t groups = 0;
  float epsilon = 0;
  MdnetWinogradWeights* constant = nullptr;  // w, where it is a constant of the graph

  ~GroupNormSiluConv() { free(constant); }

  OrtStatus* prepare(const OrtKernelInfo* info) {
    MDNET_TRY(api.KernelInfoGetAttribute_int64(info, "groups", &groups));
    MDNET_TRY(api.KernelInfoGetAttribute_float(info, "epsilon", &epsilon));
    if (groups < 1) return refuse("groups must be at least 1");
    int is_constant = 0;
    const OrtValue* value = nullptr;
    MDNET_TRY(api.KernelInfoGetConstantInput_tensor(info, kW, &is_constant, &value));
    if (!is_constant) return nullptr;
    Tensor w;
    MDNET_TRY(w.read(api, value));
    if (!is_filter(w.shape)) return nullptr;  // compute will refuse it
    constant = packed(w);
    return constant ? nullptr : refuse("no memory for the weights");
  }

  OrtStatus* compute(Run& run) const {
    Tensor inputs[kInputs];
    MDNET_TRY(run.inputs(inputs));
    const Shape &x = inputs[kX].shape, &w = inputs[kW].shape;
    if (x.rank != 4) return refuse("x must have 4 axes: batch, height, width, channels");
    if (!is_filter(w) || w.sizes[1] != x.sizes[3]) return refuse("w must have 4 axes: outputs, channels of x, 3, 3");
    const int64_t channels = x.sizes[3], outputs = w.sizes[0], sizes[] = {x.sizes[0], x.sizes[1], x.sizes[2], outputs};
    if (channels % groups) return refuse("the channels of x can't be divided by groups");
    if (inputs[kGamma].shape.elements() != channels || inputs[kBeta].shape.elements() != channels) {
      return refuse("gamma and beta need an element for each channel of x");
    }
    if (inputs[kBias].shape.elements() != outputs) return refuse("bias must have an element for each output");
    const bool sum = op.flags & kSum;
    if (sum && !inputs[kResidual].shape.is(4, sizes)) return refuse("the residual must have the shape of y");
    MdnetWinograd call = {};
    MDNET_TRY(run.output(sizes, 4, &call.y));
    if (!x.elements()) return nullptr;
    const Buffer<float> affine(2 * x.sizes[0] * channels);
    if (!affine) return refuse("no memory");
    MdnetGroupNormScale norm = {};
    norm.batch = x.sizes[0];
    norm.pixels = x.sizes[1] * x.sizes[2];
    norm.channels = channels;
    norm.groups = groups;
    norm.x = inputs[kX].floats();
    norm.gamma = inputs[kGamma].floats();
    norm.beta = inputs[kBeta].floats();
    norm.scale = affine.data();
    norm.offset = affine.data() + x.sizes[0] * channels;
    norm.epsilon = epsilon;
    MDNET_TRY(run.on_threads(mdnet_group_norm_scale, norm));
    MdnetWinogradWeights* own = constant ? nullptr : packed(inputs[kW]);
    call.batch = x.sizes[0];
    call.height = x.sizes[1];
    call.width = x.sizes[2];
    call.x = inputs[kX].data;
    call.scale = norm.scale;
    call.offset = norm.offset;
    call.weights = constant ? constant : own;
    call.bias = inputs[kBias].floats();
    call.residual = sum ? inputs[kResidual].floats() : nullptr;
    call.silu = 1;
    OrtStatus* status = call.weights ? run.on_threads(mdnet_winograd, call) : refuse("no memory for the weights");
    free(own);
    return status;
  }
};

const Op<GroupNormSiluConv> convolutions[] = {
    {"GroupNormSiluConv", "fffff", 'f'},
    {"GroupNormSiluConvSum", "ffffff", 'f', kSum},
};

}  // namespace

OrtStatus* add_resnet(OrtCustomOpDomain* domain, const OrtApi& api) { return add_to(domain, api, convolutions); }
