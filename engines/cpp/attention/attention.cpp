// Attention on the host's threads: k and v are packed, a task for each panel; then each task makes a few rows of y. It
// keeps the scores of these rows to itself, so that they stay in the cache.
#include "attention/attention.h"

#include <initializer_list>

#include "common/arena.h"
#include "common/buffer.h"
#include "common/parallel.h"
#include "matmul/kernel.h"

namespace {

// k or v, each the right side of a product: packed by the caller, or here.
class Packed {
 public:
  Packed(const MdnetMatmul& product, const void* packed, int64_t matrices)
      : product_(product),
        packed_(static_cast<const uint32_t*>(packed)),
        matrices_(matrices),
        own_(packed ? 0 : matrices * packed_b(product)) {}
  explicit operator bool() const { return packed_ || own_; }

  int64_t panels_to_pack() const { return packed_ ? 0 : matrices_ * b_panels(product_); }
  void pack(const MatmulKernel& kernel, int64_t panel) const { pack_b_panel(kernel, product_, panel, own_.data()); }

  // The product of some packed rows, `a`, with this side; `product` says where to write it.
  void multiply(const MatmulKernel& kernel, const MdnetMatmul& product, const uint32_t* a, int64_t image) const {
    const uint32_t* b = (packed_ ? packed_ : own_.data()) + image % matrices_ * packed_b(product_);
    for (int64_t panel = 0; panel < b_panels(product_); ++panel) {
      const int64_t all = pairs(product_);
      kernel.multiply(product, a, all, b + b_panel_start(product_, panel), panel, all, false, 0, 0);
    }
  }

 private:
  const MdnetMatmul& product_;
  const uint32_t* const packed_;
  const int64_t matrices_;
  const Buffer<uint32_t> own_;
};

class Attention {
 public:
  Attention(const MdnetAttention& call, const MatmulKernel& kernel)
      : call_(call),
        kernel_(kernel),
        scores_(product_of(call.rows, call.inner, call.keys, call.k)),
        sums_(product_of(call.rows, call.keys, call.columns, call.v)),
        k_(scores_, call.k_packed, call.k_matrices),
        v_(sums_, call.v_packed, call.v_matrices) {}

  int run(const Host& host) const {
    if (!k_ || !v_) return MDNET_NO_MEMORY;
    const int64_t k_panels = k_.panels_to_pack();
    host.run(k_panels + v_.panels_to_pack(),
             [&](int64_t task) { task < k_panels ? k_.pack(kernel_, task) : v_.pack(kernel_, task - k_panels); });
    const int64_t panels = a_panels(scores_);
    return host.run_and_check(call_.batch * panels, [&](int64_t task) { return rows(task / panels, task % panels); });
  }

 private:
  static MdnetMatmul product_of(int64_t rows, int64_t inner, int64_t columns, const float* b) {
    MdnetMatmul product = {};
    product.rows = rows;
    product.inner = inner;
    product.columns = columns;
    product.b = b;
    return product;
  }

  // The rows of y that belong to a panel of q.
  int rows(int64_t image, int64_t panel) const {
    const int64_t first = panel * kRows, count = smaller(call_.rows - first, kRows);
    const int64_t packed_size = kRows * larger(pairs(scores_), pairs(sums_));
    Arena arena(size_t(count * call_.keys + packed_size) * sizeof(float) + 2 * kAlignment);
    if (!arena) return MDNET_NO_MEMORY;
    float* scores = arena.take<float>(count * call_.keys);
    uint32_t* packed = arena.take<uint32_t>(packed_size);  // q; then the softmax
    float inverse_sums[kRows];
    MdnetMatmul product = scores_;
    product.rows = count;
    product.a = call_.q + (image % call_.q_matrices * call_.rows + first) * call_.inner;
    product.y = scores;
    kernel_.pack_a(product, 0, 0, 0, pairs(product), packed);
    k_.multiply(kernel_, product, packed, image);
    kernel_.softmax(scores, count, call_.keys, packed, inverse_sums);
    product = sums_;
    product.rows = count;
    product.y = call_.y + (image * call_.rows + first) * call_.columns;
    v_.multiply(kernel_, product, packed, image);
    kernel_.scale_rows(product.y, count, call_.columns, inverse_sums);
    return MDNET_OK;
  }

  const MdnetAttention& call_;
  const MatmulKernel& kernel_;
  const MdnetMatmul scores_, sums_;  // q k and softmax(q k) v: what all rows have in common
  const Packed k_, v_;
};

bool sensible(const MdnetAttention& call) {
  for (int64_t matrices : {call.q_matrices, call.k_matrices, call.v_matrices}) {
    if (matrices < 1 || call.batch % matrices) return false;
  }
  return call.batch > 0 && call.rows > 0 && call.keys > 0 && call.inner > 0 && call.columns > 0;
}

}  // namespace

extern "C" int mdnet_attention(const MdnetAttention* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || !sensible(*call)) return MDNET_BAD_ARGUMENT;
  const MatmulKernel* kernel = matmul_kernel();
  if (!kernel) return MDNET_NO_ISA;
  return Attention(*call, *kernel).run({parallel_for, host});
}
