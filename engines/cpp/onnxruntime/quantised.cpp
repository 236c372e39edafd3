// What runs between two quantised layers: group normalisation, residual sums and GEGLU from and to uint8.
#include "quantised/quantised.h"

#include <initializer_list>

#include "onnxruntime/op.h"

namespace {

constexpr size_t kMaxInputs = 8;
constexpr const char* kNotScalar = "scales and zero-points must be scalars";
constexpr int kSilu = 1;

struct GroupNorm : Node {
  int64_t groups = 0;
  float epsilon = 0;

  OrtStatus* prepare(const OrtKernelInfo* info) {
    MDNET_TRY(api.KernelInfoGetAttribute_int64(info, "groups", &groups));
    MDNET_TRY(api.KernelInfoGetAttribute_float(info, "epsilon", &epsilon));
    return groups < 1 ? refuse("groups must be at least 1") : nullptr;
  }

  OrtStatus* compute(Run& run) const {
    Tensor inputs[kMaxInputs];
    MDNET_TRY(run.inputs(inputs));
    const Shape& x = inputs[0].shape;
    if (x.rank != 4) return refuse("x must have 4 axes: batch, height, width, channels");
    const int64_t channels = x.sizes[3];
    if (channels % groups) return refuse("the channels of x can't be divided by groups");
    const bool x_is_uint8 = op.inputs[0] == 'b';
    const size_t gamma = x_is_uint8 ? 3 : 1, beta = gamma + 1, end = beta + 3;  // y's scale and zero-point come last
    for (size_t i = 1; i < end; ++i) {
      const bool per_channel = i == gamma || i == beta;
      if (inputs[i].shape.elements() == (per_channel ? channels : 1)) continue;
      return refuse(per_channel ? "gamma and beta need an element for each channel of x" : kNotScalar);
    }
    MdnetGroupNorm call = {};
    MDNET_TRY(run.output(x.sizes, x.rank, &call.y));
    if (!x.elements()) return nullptr;
    call.batch = x.sizes[0];
    call.pixels = x.sizes[1] * x.sizes[2];
    call.channels = channels;
    call.groups = groups;
    call.x = inputs[0].data;
    call.gamma = inputs[gamma].floats();
    call.beta = inputs[beta].floats();
    call.x_is_uint8 = x_is_uint8;
    call.x_scale = x_is_uint8 ? *inputs[1].floats() : 1;
    call.epsilon = epsilon;
    call.y_scale = *inputs[beta + 1].floats();
    call.y_zero_point = *inputs[beta + 2].bytes();
    call.silu = op.flags & kSilu;
    return run.on_threads(mdnet_group_norm, call);
  }
};

struct ResidualSum : Node {
  OrtStatus* compute(Run& run) const {
    Tensor inputs[kMaxInputs];
    MDNET_TRY(run.inputs(inputs));
    MdnetResidualSum call = {};
    call.a_is_uint8 = op.inputs[0] == 'b';
    call.y_is_uint8 = op.output == 'b';
    const size_t b = call.a_is_uint8 ? 3 : 1, end = b + 3 + (call.y_is_uint8 ? 2 : 0);
    const Shape& shape = inputs[0].shape;
    if (shape.rank > kMaxRank || !shape.is(inputs[b].shape.rank, inputs[b].shape.sizes)) {
      return refuse("a and b must have one shape, of 8 axes at most");
    }
    for (size_t i = 1; i < end; ++i) {
      if (i != b && inputs[i].shape.elements() != 1) return refuse(kNotScalar);
    }
    MDNET_TRY(run.output(shape.sizes, shape.rank, &call.y));
    if (!shape.elements()) return nullptr;
    call.count = shape.elements();
    call.a = inputs[0].data;
    call.b = inputs[b].bytes();
    call.a_scale = call.a_is_uint8 ? *inputs[1].floats() : 1;
    call.a_zero_point = call.a_is_uint8 ? *inputs[2].bytes() : 0;
    call.b_scale = *inputs[b + 1].floats();
    call.b_zero_point = *inputs[b + 2].bytes();
    call.y_scale = call.y_is_uint8 ? *inputs[b + 3].floats() : 1;
    call.y_zero_point = call.y_is_uint8 ? *inputs[b + 4].bytes() : 0;
    return run.on_threads(mdnet_residual_sum, call);
  }
};

struct Geglu : Node {
  OrtStatus* compute(Run& run) const {
    Tensor inputs[6];
    MDNET_TRY(run.inputs(inputs));
    Shape shape = inputs[0].shape;
    if (!shape.rank || shape.rank > kMaxRank) return refuse("x must have 1 to 8 axes");
    int64_t& channels = shape.sizes[shape.rank - 1];
    if (channels % 2 || inputs[3].shape.elements() != channels) {
      return refuse("x must have an even number of channels, and bias as many");
    }
    for (size_t i : {1, 2, 4, 5}) {
      if (inputs[i].shape.elements() != 1) return refuse(kNotScalar);
    }
    channels /= 2;
    MdnetGeglu call = {};
    MDNET_TRY(run.output(shape.sizes, shape.rank, &call.y));
    if (!shape.elements()) return nullptr;
    call.channels = channels;
    call.rows = shape.elements() / channels;
    call.x = inputs[0].bytes();
    call.bias = inputs[3].floats();
    call.x_scale = *inputs[1].floats();
    call.x_zero_point = *inputs[2].bytes();
    call.y_scale = *inputs[4].floats();
    call.y_zero_point = *inputs[5].bytes();
    return run.on_threads(mdnet_geglu, call);
  }
};

const Op<GroupNorm> group_norms[] = {
    {"QLinearGroupNorm", "bfbfffb", 'b'},
    {"QLinearGroupNormSilu", "bfbfffb", 'b', kSilu},
    {"GroupNormQuantize", "ffffb", 'b'},
    {"GroupNormSiluQuantize", "ffffb", 'b', kSilu},
};
const Op<ResidualSum> residual_sums[] = {
    {"ResidualSum", "fbfb", 'f'},
    {"QLinearResidualSum", "bfbbfb", 'f'},
    {"ResidualSumQuantize", "fbfbfb", 'b'},
    {"QLinearResidualSumQuantize", "bfbbfbfb", 'b'},
};
const Op<Geglu> geglus[] = {{"QLinearGeglu", "bfbffb", 'b'}};

}  // namespace

OrtStatus* add_quantised(OrtCustomOpDomain* domain, const OrtApi& api) {
  MDNET_TRY(add_to(domain, api, group_norms));
  MDNET_TRY(add_to(domain, api, residual_sums));
  return add_to(domain, api, geglus);
}
