// Attention on the host's threads: k and v are packed, a task for each panel; then each task makes a few rows of y,
// whose scores it alone sees, so that they stay in the cache.
#include "attention/attention.h"

#include <stdlib.h>

#include <atomic>
#include <initializer_list>

#include "matmul/packing.h"
#include "simd/builds.h"

namespace {

class Attention {
 public:
  Attention(const MdnetAttention& call, const MdnetProductKernel& kernel)
      : call_(call), kernel_(kernel), keys_(keys_call(call)), values_(values_call(call)) {
    own_k_ = call.k_packed ? nullptr : allocate(call.k_matrices * packed_b(keys_));
    own_v_ = call.v_packed ? nullptr : allocate(call.v_matrices * packed_b(values_));
  }
  ~Attention() {
    free(own_k_);
    free(own_v_);
  }
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;
  int status() const {
    return (call_.k_packed || own_k_) && (call_.v_packed || own_v_) ? status_.load() : int(MDNET_NO_MEMORY);
  }

  int64_t key_panels() const { return own_k_ ? call_.k_matrices * panels(keys_) : 0; }
  int64_t value_panels() const { return own_v_ ? call_.v_matrices * panels(values_) : 0; }
  void pack(int64_t task) {
    if (task < key_panels()) {
      pack_panel(kernel_, keys_, task, own_k_);
    } else {
      pack_panel(kernel_, values_, task - key_panels(), own_v_);
    }
  }

  int64_t tasks() const { return call_.batch * groups(keys_); }
  void run(int64_t task) {
    const int64_t image = task / groups(keys_), first = task % groups(keys_) * kRows;
    const int64_t left = call_.rows - first, rows = left < kRows ? left : kRows;
    const int64_t scores = (rows * call_.keys + 15) / 16 * 16,
                  longest = pairs(keys_) > pairs(values_) ? pairs(keys_) : pairs(values_);
    uint32_t* memory = allocate(scores + kRows * longest);
    if (!memory) return status_.store(MDNET_NO_MEMORY);
    float* weights = reinterpret_cast<float*>(memory);
    uint32_t* scratch = memory + scores;
    float shares[kRows];
    MdnetProduct product = keys_;
    product.rows = rows;
    product.a = call_.q + (image % call_.q_matrices * call_.rows + first) * call_.inner;
    product.y = weights;
    kernel_.pack_rows(product, 0, 0, 0, pairs(product), scratch);
    multiply(product, scratch, packed(own_k_, call_.k_packed, keys_, image % call_.k_matrices));
    kernel_.softmax(weights, rows, call_.keys, scratch, shares);
    product = values_;
    product.rows = rows;
    product.y = call_.y + (image * call_.rows + first) * call_.columns;
    multiply(product, scratch, packed(own_v_, call_.v_packed, values_, image % call_.v_matrices));
    kernel_.scale(product.y, rows, call_.columns, shares);
    free(memory);
  }

 private:
  static MdnetProduct keys_call(const MdnetAttention& call) {
    MdnetProduct product = {};
    product.rows = call.rows;
    product.columns = call.keys;
    product.inner = call.inner;
    product.b = call.k;
    return product;
  }
  static MdnetProduct values_call(const MdnetAttention& call) {
    MdnetProduct product = {};
    product.rows = call.rows;
    product.columns = call.columns;
    product.inner = call.keys;
    product.b = call.v;
    return product;
  }
  static const uint32_t* packed(const uint32_t* own, const void* given, const MdnetProduct& call, int64_t matrix) {
    return (own ? own : static_cast<const uint32_t*>(given)) + matrix * packed_b(call);
  }

  // A group of rows, packed, by b.
  void multiply(const MdnetProduct& product, const uint32_t* rows, const uint32_t* b) const {
    for (int64_t panel = 0; panel < panels(product); ++panel) {
      const uint32_t* columns = b + panel * kColumns * pairs(product);
      kernel_.multiply(product, rows, pairs(product), columns, panel, pairs(product), false, 0, 0);
    }
  }

  const MdnetAttention& call_;
  const MdnetProductKernel& kernel_;
  const MdnetProduct keys_, values_;  // what they have in common for all rows
  uint32_t *own_k_, *own_v_;          // null where they came packed
  std::atomic<int> status_{MDNET_OK};
};

bool sensible(const MdnetAttention& call) {
  for (int64_t matrices : {call.q_matrices, call.k_matrices, call.v_matrices}) {
    if (matrices < 1 || call.batch % matrices) return false;
  }
  return call.batch > 0 && call.rows > 0 && call.keys > 0 && call.inner > 0 && call.columns > 0;
}

}  // namespace

extern "C" {

int mdnet_attention(const MdnetAttention* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || !sensible(*call)) return MDNET_BAD_ARGUMENT;
  const MdnetProductKernel* kernel = product_kernel();
  if (!kernel) return MDNET_NO_ISA;
  Attention attention(*call, *kernel);
  if (attention.status() != MDNET_OK) return attention.status();
  if (const int64_t panels = attention.key_panels() + attention.value_panels()) {
    parallel_for(
        host, [](void* attention, size_t i) { static_cast<Attention*>(attention)->pack(int64_t(i)); }, &attention,
        size_t(panels));
  }
  parallel_for(
      host, [](void* attention, size_t i) { static_cast<Attention*>(attention)->run(int64_t(i)); }, &attention,
      size_t(attention.tasks()));
  return attention.status();
}

int mdnet_attention_here(const MdnetAttention* call) { return mdnet_attention(call, in_turn, nullptr); }

}  // extern "C"
