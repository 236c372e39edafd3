// Products of matrices in bfloat16 on the host's threads: first the columns are packed, a task for each panel, then
// each task makes a few rows of y. Every element of y is one sum in one order, whatever the batch and the threads are.
#include "matmul/matmul.h"

#include "matmul/packing.h"
#include "simd/builds.h"

namespace {

constexpr int64_t kTasks = 64;      // at most, where more would have less than kWork to do
constexpr int64_t kWork = 1 << 20;  // multiplications

bool sensible(const MdnetProduct& call) {
  return call.batch > 0 && call.rows > 0 && call.columns > 0 && call.inner > 0 && call.a_matrices > 0 &&
         call.b_matrices > 0 && call.batch % call.a_matrices == 0 && call.batch % call.b_matrices == 0;
}

struct Product {
  const MdnetProduct& call;
  const MdnetProductKernel& kernel;
  uint32_t* own_b;  // null where b came packed
  int64_t groups_per_task;

  int64_t tasks_per_image() const { return ratio_up(groups(call), groups_per_task); }

  void run(int64_t task) const {
    const int64_t image = task / tasks_per_image(), first = task % tasks_per_image() * groups_per_task;
    const int64_t end = first + groups_per_task < groups(call) ? first + groups_per_task : groups(call);
    for (int64_t group = first; group < end; ++group) multiply(image, group);
  }

  void multiply(int64_t image, int64_t group) const {
    constexpr int64_t kPairs = MdnetProductKernel::kPairs;
    alignas(64) uint32_t rows[kRows * kPairs];
    const int64_t matrix = image % call.a_matrices;
    const uint32_t* b = static_cast<const uint32_t*>(own_b ? own_b : call.b_packed);
    b += image % call.b_matrices * packed_b(call);
    for (int64_t first = 0; first < pairs(call); first += kPairs) {
      const int64_t count = pairs(call) - first < kPairs ? pairs(call) - first : kPairs;
      const uint32_t* a = rows;
      int64_t stride = count;
      if (call.a_packed) {
        stride = pairs(call);
        a = static_cast<const uint32_t*>(call.a_packed) + matrix * packed_a(call) + group * kRows * stride + first;
      } else {
        kernel.pack_rows(call, matrix, group, first, count, rows);
      }
      for (int64_t panel = 0; panel < panels(call); ++panel) {
        const int64_t width = call.columns - panel * kColumns > kColumns / 2 ? kColumns : kColumns / 2;
        const uint32_t* columns = b + panel * kColumns * pairs(call) + first * width;
        kernel.multiply(call, a, stride, columns, panel, count, first > 0, image, group);
      }
    }
  }
};

}  // namespace

extern "C" {

int mdnet_has_bfloat16(void) {
#ifdef MDNET_HAS_PRODUCT
  __builtin_cpu_init();
  return mdnet_isa() == MDNET_AVX512 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}

int mdnet_product(const MdnetProduct* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || !sensible(*call)) return MDNET_BAD_ARGUMENT;
  const MdnetProductKernel* chosen = product_kernel();
  if (!chosen) return MDNET_NO_ISA;
  uint32_t* own_b = call->b_packed ? nullptr : allocate(call->b_matrices * packed_b(*call));
  if (!own_b && !call->b_packed) return MDNET_NO_MEMORY;
  // Few tasks, so that little is spent on handing them out; but none so long that the others wait for it.
  const int64_t work = call->batch * call->rows * call->columns * call->inner;
  const int64_t tasks = work / kWork > kTasks ? work / kWork : kTasks;
  const int64_t wanted = call->batch * groups(*call) / tasks;
  Product product{*call, *chosen, own_b, wanted > 1 ? wanted : 1};
  if (own_b) {
    parallel_for(
        host,
        [](void* product, size_t i) {
          const Product& self = *static_cast<const Product*>(product);
          pack_panel(self.kernel, self.call, int64_t(i), self.own_b);
        },
        &product, size_t(call->b_matrices * panels(*call)));
  }
  parallel_for(
      host, [](void* product, size_t i) { static_cast<const Product*>(product)->run(int64_t(i)); }, &product,
      size_t(call->batch * product.tasks_per_image()));
  free(own_b);
  return MDNET_OK;
}

void* mdnet_product_pack(const MdnetProduct* call, int b) {
  const MdnetProductKernel* chosen = product_kernel();
  if (!call || !sensible(*call) || !chosen) return nullptr;
  const int64_t matrices = b ? call->b_matrices : call->a_matrices, size = b ? packed_b(*call) : packed_a(*call);
  uint32_t* packed = allocate(matrices * size);
  if (!packed) return nullptr;
  for (int64_t i = 0; b && i < matrices * panels(*call); ++i) pack_panel(*chosen, *call, i, packed);
  for (int64_t i = 0; !b && i < matrices * groups(*call); ++i) {
    uint32_t* to = packed + i * kRows * pairs(*call);
    chosen->pack_rows(*call, i / groups(*call), i % groups(*call), 0, pairs(*call), to);
  }
  return packed;
}

int mdnet_product_here(const MdnetProduct* call) { return mdnet_product(call, in_turn, nullptr); }

}  // extern "C"
