// mdnet::BFloat16MatMul, BFloat16MatMulTransposedA and BFloat16MatMulTransposedB.
#include "matmul/matmul.h"

#include "onnxruntime/matrices.h"

namespace {

constexpr int kATransposed = 1, kBTransposed = 2;

struct MatMul : Node {
  PackedConstant a_packed = {}, b_packed = {};

  bool a_transposed() const { return op.flags & kATransposed; }
  bool b_transposed() const { return op.flags & kBTransposed; }

  OrtStatus* prepare(const OrtKernelInfo* info) {
    MDNET_TRY(a_packed.pack(api, info, 0, a_transposed(), false));
    return b_packed.pack(api, info, 1, b_transposed(), true);
  }

  OrtStatus* compute(Run& run) const {
    Matrices inputs[2];
    MDNET_TRY(run.inputs(inputs));
    const Matrices &a = inputs[0], &b = inputs[1];
    if (!a.readable() || !b.readable()) return refuse("a and b must have 2 to 8 axes");
    MdnetMatmul call = {};
    call.inner = a.columns(a_transposed());
    if (call.inner != b.rows(b_transposed())) return refuse("the inner axes of a and b differ");
    Shape y;
    call.batch = broadcast(inputs, &y);
    if (call.batch < 0) return refuse(kUnfit);
    call.rows = y.sizes[y.rank - 2] = a.rows(a_transposed());
    call.columns = y.sizes[y.rank - 1] = b.columns(b_transposed());
    MDNET_TRY(run.output(y.sizes, y.rank, &call.y));
    if (!y.elements()) return nullptr;
    if (!call.inner) {
      memset(call.y, 0, size_t(y.elements()) * sizeof(float));
      return nullptr;
    }
    call.a_matrices = a.count();
    call.b_matrices = b.count();
    call.a = a.floats();
    call.b = b.floats();
    call.a_packed = a_packed.data;
    call.b_packed = b_packed.data;
    call.a_transposed = a_transposed();
    call.b_transposed = b_transposed();
    return run.on_threads(mdnet_matmul, call);
  }
};

const Op<MatMul> operators[] = {
    {"BFloat16MatMul", "ff", 'f'},
    {"BFloat16MatMulTransposedA", "ff", 'f', kATransposed},
    {"BFloat16MatMulTransposedB", "ff", 'f', kBTransposed},
};

}  // namespace

OrtStatus* add_matmul(OrtCustomOpDomain* domain, const OrtApi& api) {
  if (!mdnet_has_bfloat16()) return nullptr;  // the function body then runs: float32 products of rounded values
  return add_to(domain, api, operators);
}
