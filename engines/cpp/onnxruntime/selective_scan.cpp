// mdnet::SelectiveScan and mdnet::SelectiveScanReverse, on the CPU and on CUDA.
#include "onnxruntime/op.h"
#include "scan/scan.h"

namespace {

enum Input { kU, kDelta, kA, kB, kC, kD, kZ, kDeltaBias, kInputs };
constexpr const char* kInputNames[kInputs] = {"u", "delta", "A", "B", "C", "D", "z", "delta_bias"};
constexpr int kReverse = 1;

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

MdnetRows contiguous(const Tensor& tensor) {
  return {tensor.data, tensor.shape.sizes[1] * tensor.shape.sizes[2], tensor.shape.sizes[2]};
}

struct SelectiveScan : Node {
  OrtStatus* check_shapes(const Tensor (&inputs)[kInputs]) const {
    const Shape &u = inputs[kU].shape, &A = inputs[kA].shape;
    if (u.rank != 3 || A.rank != 2) {
      return refuse("u must have 3 axes (batch, channels, length), A 2 (channels, states); they have %zu and %zu",
                    u.rank, A.rank);
    }
    if (!u.elements() || !A.sizes[1]) {
      return refuse("u %s or A %s has an empty axis", Text(u).text, Text(A).text);
    }
    const int64_t *steps = u.sizes, channels = u.sizes[1], states = A.sizes[1];
    const int64_t mix[3] = {u.sizes[0], states, u.sizes[2]}, parameters[2] = {channels, states};
    for (int i = 0; i < kInputs; ++i) {
      const bool parameter = i == kD || i == kDeltaBias;
      const size_t rank = parameter ? 1 : i == kA ? 2 : 3;
      const int64_t* wanted = parameter || i == kA ? parameters : i == kB || i == kC ? mix : steps;
      const Shape& shape = inputs[i].shape;
      if (shape.is(rank, wanted)) continue;
      return refuse("%s is %s, but u %s and A %s need %s", kInputNames[i],
                    shape.rank <= 3 ? Text(shape).text : "of more than 3 axes", Text(u).text, Text(A).text,
                    Text(wanted, rank).text);
    }
    return nullptr;
  }

  OrtStatus* compute(Run& run) const {
    Tensor inputs[kInputs];
    MDNET_TRY(run.inputs(inputs));
    MDNET_TRY(check_shapes(inputs));
    const Shape& u = inputs[kU].shape;
    MdnetScan scan = {};
    MDNET_TRY(run.output(u.sizes, u.rank, &scan.y));
    scan.batch = u.sizes[0];
    scan.channels = u.sizes[1];
    scan.length = u.sizes[2];
    scan.states = inputs[kA].shape.sizes[1];
    scan.type = op.output == 'f' ? MDNET_FLOAT32 : op.output == 'h' ? MDNET_FLOAT16 : MDNET_BFLOAT16;
    scan.reverse = op.flags & kReverse;
    scan.u = contiguous(inputs[kU]);
    scan.delta = contiguous(inputs[kDelta]);
    scan.z = contiguous(inputs[kZ]);
    scan.B = contiguous(inputs[kB]);
    scan.C = contiguous(inputs[kC]);
    scan.A = inputs[kA].data;
    scan.D = inputs[kD].data;
    scan.delta_bias = inputs[kDeltaBias].data;
    if (op.provider == kCpu) return run.on_threads(mdnet_scan, scan);
    void* stream = nullptr;
    MDNET_TRY(run.stream(&stream));
    const char* problem = mdnet_scan_cuda(&scan, stream);
    return problem ? api.CreateStatus(ORT_FAIL, problem) : nullptr;
  }
};

constexpr const char *kForward = "SelectiveScan", *kBackward = "SelectiveScanReverse";
constexpr const char *kFloat = "ffffffff", *kHalf = "hhfhhfhf", *kBfloat = "ggfggfgf";

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
};

}  // namespace

OrtStatus* add_selective_scan(OrtCustomOpDomain* domain, const OrtApi& api) { return add_to(domain, api, operators); }
