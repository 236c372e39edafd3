// Matrix products in bfloat16 on the host's threads: first b is packed, a task for each panel, then each task makes a
// few rows of y. Every element of y is summed in the same order whatever the batch and the number of threads.
#include "matmul/matmul.h"

#include "common/buffer.h"
#include "common/parallel.h"
#include "matmul/kernel.h"

#ifdef MDNET_X86
#include "simd/x86_features.h"

extern const MatmulKernel mdnet_avx512_bf16_matmul;
#endif

const MatmulKernel* matmul_kernel() {
#ifdef MDNET_X86
  if (mdnet_has_bfloat16()) return &mdnet_avx512_bf16_matmul;
#endif
  return nullptr;
}

namespace {

// Handing out a task takes time, and a long one keeps the others waiting at the end.
constexpr int64_t kTasks = 64;      // of a call, or more where a task would have more than kWork
constexpr int64_t kWork = 1 << 20;  // multiplications

bool sensible(const MdnetMatmul& call) {
  return call.batch > 0 && call.rows > 0 && call.columns > 0 && call.inner > 0 && call.a_matrices > 0 &&
         call.b_matrices > 0 && call.batch % call.a_matrices == 0 && call.batch % call.b_matrices == 0;
}

// The rows of y that belong to a panel of a; `b` is packed.
void multiply_panel(const MdnetMatmul& call, const MatmulKernel& kernel, const uint32_t* b, int64_t image,
                    int64_t a_panel) {
  constexpr int64_t kPairs = MatmulKernel::kPairs;
  alignas(64) uint32_t rows[kRows * kPairs];
  const int64_t matrix = image % call.a_matrices;
  b += image % call.b_matrices * packed_b(call);
  for (int64_t first = 0; first < pairs(call); first += kPairs) {
    const int64_t count = smaller(pairs(call) - first, kPairs);
    const uint32_t* a = rows;
    int64_t stride = count;
    if (call.a_packed) {
      stride = pairs(call);
      a = static_cast<const uint32_t*>(call.a_packed) + matrix * packed_a(call) + a_panel_start(call, a_panel) + first;
    } else {
      kernel.pack_a(call, matrix, a_panel, first, count, rows);
    }
    for (int64_t panel = 0; panel < b_panels(call); ++panel) {
      const int64_t width = call.columns - panel * kColumns > kColumns / 2 ? kColumns : kColumns / 2;
      const uint32_t* columns = b + b_panel_start(call, panel) + first * width;
      kernel.multiply(call, a, stride, columns, panel, count, first > 0, image, a_panel);
    }
  }
}

}  // namespace

extern "C" {

int mdnet_has_bfloat16(void) {
#ifdef MDNET_X86
  return x86_has(kAvx512Bf16);
#else
  return 0;
#endif
}

int mdnet_matmul(const MdnetMatmul* call, MdnetParallelFor parallel_for, void* host) {
  if (!call || !sensible(*call)) return MDNET_BAD_ARGUMENT;
  const MatmulKernel* kernel = matmul_kernel();
  if (!kernel) return MDNET_NO_ISA;
  const Host threads{parallel_for, host};
  const uint32_t* b = static_cast<const uint32_t*>(call->b_packed);
  const Buffer<uint32_t> own_b(b ? 0 : call->b_matrices * packed_b(*call));
  if (!b) {
    if (!own_b) return MDNET_NO_MEMORY;
    threads.run(call->b_matrices * b_panels(*call),
                [&](int64_t task) { pack_b_panel(*kernel, *call, task, own_b.data()); });
    b = own_b.data();
  }
  const int64_t tasks = larger(call->batch * call->rows * call->columns * call->inner / kWork, kTasks);
  const int64_t panels = larger(call->batch * a_panels(*call) / tasks, 1);  // of a task
  const int64_t tasks_per_image = ceil_div(a_panels(*call), panels);
  threads.run(call->batch * tasks_per_image, [&](int64_t task) {
    const int64_t image = task / tasks_per_image, first = task % tasks_per_image * panels;
    const int64_t end = smaller(first + panels, a_panels(*call));
    for (int64_t panel = first; panel < end; ++panel) multiply_panel(*call, *kernel, b, image, panel);
  });
  return MDNET_OK;
}

void* mdnet_matmul_pack(const MdnetMatmul* call, int b) {
  const MatmulKernel* kernel = matmul_kernel();
  if (!call || !sensible(*call) || !kernel) return nullptr;
  const int64_t matrices = b ? call->b_matrices : call->a_matrices, size = b ? packed_b(*call) : packed_a(*call);
  uint32_t* packed = allocate<uint32_t>(size_t(matrices * size));
  if (!packed) return nullptr;
  for (int64_t i = 0; b && i < matrices * b_panels(*call); ++i) pack_b_panel(*kernel, *call, i, packed);
  for (int64_t i = 0; !b && i < matrices * a_panels(*call); ++i) {
    kernel->pack_a(*call, i / a_panels(*call), i % a_panels(*call), 0, pairs(*call), packed + a_panel_start(*call, i));
  }
  return packed;
}

}  // extern "C"
