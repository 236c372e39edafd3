// mdnet::SelectiveScan and mdnet::SelectiveScanReverse, and version 2, mdnet::SelectiveScan2 with what its name adds:
// on the CPU and on CUDA.
#include "onnxruntime/op.h"
#include "scan/scan.h"

namespace {

enum Input { kU, kDelta, kA, kB, kC, kD, kZ, kDeltaBias, kH0, kInputs };
constexpr const char* kInputNames[kInputs] = {"u", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0"};
enum Flags { kReverse = 1, kGroups = 2, kNoZ = 4, kNoSoftplus = 8, kState = 16 };

// A shape as messages show it.
struct Text {
  char text[64];

  Text(const int64_t* sizes, size_t rank) {
    size_t used = size_t(snprintf(text, sizeof text, "("));
    for (size_t i = 0; i < rank && used < sizeof text; ++i) {
      used += size_t(snprintf(text + used, sizeof text - used, i ? ", %lld" : "%lld", (long long)sizes[i]));
    }
    if (used < sizeof text) snprintf(text + used, sizeof text - used, rank == 1 ? ",)" : ")");
  }
  explicit Text(const Shape& shape) : Text(shape.sizes, shape.rank) {}
};

// (batch, rows, length), or (batch, groups, rows, length) with the rows of all groups.
MdnetRows contiguous(const Tensor& tensor) {
  const Shape& shape = tensor.shape;
  if (!shape.rank) return {};  // an input that the operator lacks
  const int64_t length = shape.sizes[shape.rank - 1], rows = shape.sizes[1] * (shape.rank == 4 ? shape.sizes[2] : 1);
  return {tensor.data, rows * length, length};
}

struct SelectiveScan : Node {
  bool has(int input) const { return input == kZ ? !(op.flags & kNoZ) : input == kH0 ? bool(op.flags & kState) : true; }

  // Those that the operator lacks stay empty.
  OrtStatus* inputs(const Run& run, Tensor (&tensors)[kInputs]) const {
    size_t position = 0;
    for (int i = 0; i < kInputs; ++i) {
      if (has(i)) MDNET_TRY(run.input(position++, &tensors[i]));
    }
    return nullptr;
  }

  OrtStatus* check_shapes(const Tensor (&inputs)[kInputs]) const {
    const Shape &u = inputs[kU].shape, &A = inputs[kA].shape, &B = inputs[kB].shape;
    if (u.rank != 3 || A.rank != 2) {
      return refuse("u must have 3 axes (batch, channels, length), A 2 (channels, states); they have %zu and %zu",
                    u.rank, A.rank);
    }
    if (!u.elements() || !A.sizes[1]) {
      return refuse("u %s or A %s has an empty axis", Text(u).text, Text(A).text);
    }
    const int64_t batch = u.sizes[0], channels = u.sizes[1], length = u.sizes[2], states = A.sizes[1];
    const bool grouped = (op.flags & kGroups) && B.rank == 4;
    const int64_t mix[3] = {batch, states, length}, mixes[4] = {batch, B.sizes[1], states, length};
    const int64_t parameters[2] = {channels, states}, state[3] = {batch, channels, states};
    for (int i = 0; i < kInputs; ++i) {
      if (!has(i)) continue;
      size_t rank = 3;
      const int64_t* wanted = u.sizes;
      if (i == kA) rank = 2, wanted = parameters;
      if (i == kD || i == kDeltaBias) rank = 1, wanted = parameters;
      if (i == kB || i == kC) rank = grouped ? 4 : 3, wanted = grouped ? mixes : mix;
      if (i == kH0) wanted = state;
      const Shape& shape = inputs[i].shape;
      if (shape.is(rank, wanted)) continue;
      return refuse("%s is %s, but u %s and A %s need %s", kInputNames[i],
                    shape.rank <= 4 ? Text(shape).text : "of more than 4 axes", Text(u).text, Text(A).text,
                    Text(wanted, rank).text);
    }
    if (grouped && (!B.sizes[1] || channels % B.sizes[1])) {
      return refuse("B is %s: its groups can't share the channels of u %s evenly", Text(B).text, Text(u).text);
    }
    return nullptr;
  }

  OrtStatus* compute(Run& run) const {
    Tensor inputs[kInputs] = {};
    MDNET_TRY(this->inputs(run, inputs));
    MDNET_TRY(check_shapes(inputs));
    const Shape &u = inputs[kU].shape, &B = inputs[kB].shape;
    MdnetScan scan = {};
    MDNET_TRY(run.output(u.sizes, u.rank, &scan.y));
    if (op.flags & kState) MDNET_TRY(run.output(inputs[kH0].shape.sizes, 3, &scan.h_last, 1));
    scan.batch = u.sizes[0];
    scan.channels = u.sizes[1];
    scan.length = u.sizes[2];
    scan.states = inputs[kA].shape.sizes[1];
    scan.groups = B.rank == 4 ? int32_t(B.sizes[1]) : 1;
    scan.type = op.output == 'f' ? MDNET_FLOAT32 : op.output == 'h' ? MDNET_FLOAT16 : MDNET_BFLOAT16;
    scan.reverse = op.flags & kReverse;
    scan.no_softplus = op.flags & kNoSoftplus;
    scan.u = contiguous(inputs[kU]);
    scan.delta = contiguous(inputs[kDelta]);
    scan.z = contiguous(inputs[kZ]);
    scan.B = contiguous(inputs[kB]);
    scan.C = contiguous(inputs[kC]);
    scan.A = inputs[kA].data;
    scan.D = inputs[kD].data;
    scan.delta_bias = inputs[kDeltaBias].data;
    scan.h0 = inputs[kH0].data;
    if (op.provider == kCpu) return run.on_threads(mdnet_scan, scan);
    void* stream = nullptr;
    MDNET_TRY(run.stream(&stream));
    const char* problem = mdnet_scan_cuda(&scan, stream);
    return problem ? api.CreateStatus(ORT_FAIL, problem) : nullptr;
  }
};

constexpr const char *kForward = "SelectiveScan", *kBackward = "SelectiveScanReverse";
constexpr const char *kFloat = "ffffffff", *kHalf = "hhfhhfhf", *kBfloat = "ggfggfgf";

// Version 2: the types of u, delta, A, B, C, D, z, delta_bias and h0 with activations of type t.
#define MDNET_Z(t) t
#define MDNET_NO_Z(t) ""
#define MDNET_INPUTS(t, Z, h0) t t "f" t t "f" Z(t) "f" h0
#define MDNET_SCAN2_ON(provider, name, Z, h0, flags)                            \
  {name, MDNET_INPUTS("f", Z, h0), 'f', kGroups | (flags), provider, h0},       \
      {name, MDNET_INPUTS("h", Z, h0), 'h', kGroups | (flags), provider, h0}, { \
    name, MDNET_INPUTS("g", Z, h0), 'g', kGroups | (flags), provider, h0        \
  }
#define MDNET_SCAN2(...) MDNET_SCAN2_ON(kCpu, __VA_ARGS__), MDNET_SCAN2_ON(kCuda, __VA_ARGS__)
#define MDNET_SCAN2_STATE(name, Z, flags) \
  MDNET_SCAN2(name, Z, "", flags), MDNET_SCAN2(name "State", Z, "f", (flags) | kState)
#define MDNET_SCAN2_SOFTPLUS(name, Z, flags) \
  MDNET_SCAN2_STATE(name, Z, flags), MDNET_SCAN2_STATE(name "NoSoftplus", Z, (flags) | kNoSoftplus)
#define MDNET_SCAN2_VARIANTS(name, flags) \
  MDNET_SCAN2_SOFTPLUS(name, MDNET_Z, flags), MDNET_SCAN2_SOFTPLUS(name "NoZ", MDNET_NO_Z, (flags) | kNoZ)

const Op<SelectiveScan> operators[] = {
    {kForward, kFloat, 'f'},
    {kForward, kHalf, 'h'},
    {kForward, kBfloat, 'g'},
    {kBackward, kFloat, 'f', kReverse},
    {kBackward, kHalf, 'h', kReverse},
    {kBackward, kBfloat, 'g', kReverse},
    {kForward, kFloat, 'f', 0, kCuda},
    {kForward, kHalf, 'h', 0, kCuda},
    {kForward, kBfloat, 'g', 0, kCuda},
    {kBackward, kFloat, 'f', kReverse, kCuda},
    {kBackward, kHalf, 'h', kReverse, kCuda},
    {kBackward, kBfloat, 'g', kReverse, kCuda},
    MDNET_SCAN2_VARIANTS("SelectiveScan2", 0),
    MDNET_SCAN2_VARIANTS("SelectiveScan2Reverse", kReverse),
};

}  // namespace

OrtStatus* add_selective_scan(OrtCustomOpDomain* domain, const OrtApi& api) { return add_to(domain, api, operators); }
