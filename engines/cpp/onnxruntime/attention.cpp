// mdnet::BFloat16Attention.
#include "attention/attention.h"

#include "onnxruntime/matrices.h"

namespace {

struct Attention : Node {
  PackedConstant k_packed = {}, v_packed = {};

  OrtStatus* prepare(const OrtKernelInfo* info) {
    MDNET_TRY(k_packed.pack(api, info, 1, false, true));
    return v_packed.pack(api, info, 2, false, true);
  }

  OrtStatus* compute(Run& run) const {
    Matrices inputs[3];
    MDNET_TRY(run.inputs(inputs));
    const Matrices &q = inputs[0], &k = inputs[1], &v = inputs[2];
    if (!q.readable() || !k.readable() || !v.readable()) return refuse("q, k and v must have 2 to 8 axes");
    if (q.columns() != k.rows()) return refuse("the inner axes of q and k differ");
    if (k.columns() != v.rows()) return refuse("k and v need the same number of keys");
    Shape y;
    MdnetAttention call = {};
    call.batch = broadcast(inputs, &y);
    if (call.batch < 0) return refuse(kUnfit);
    call.rows = y.sizes[y.rank - 2] = q.rows();
    call.columns = y.sizes[y.rank - 1] = v.columns();
    call.keys = k.columns();
    call.inner = q.columns();
    MDNET_TRY(run.output(y.sizes, y.rank, &call.y));
    if (!y.elements()) return nullptr;
    if (!call.keys || !call.inner) return refuse("there is nothing to attend to: an axis is empty");
    call.q_matrices = q.count();
    call.k_matrices = k.count();
    call.v_matrices = v.count();
    call.q = q.floats();
    call.k = k.floats();
    call.v = v.floats();
    call.k_packed = k_packed.data;
    call.v_packed = v_packed.data;
    return run.on_threads(mdnet_attention, call);
  }
};

const Op<Attention> operators[] = {{"BFloat16Attention", "fff", 'f'}};

}  // namespace

OrtStatus* add_attention(OrtCustomOpDomain* domain, const OrtApi& api) {
  if (!mdnet_has_bfloat16()) return nullptr;  // the function body then runs
  return add_to(domain, api, operators);
}
