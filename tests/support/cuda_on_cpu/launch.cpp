// Runs one launch of a selective scan kernel that was compiled with cuda_on_cpu.h:
//
//   launch KERNEL FOLDER BATCH CHANNELS LENGTH STATES BYTES THREADS CHANNELS_PER_BLOCK [GROUPS SOFTPLUS LAST_STATE]
//
// FOLDER has one raw file for each tensor, and gets y; BYTES is the size of an activation. The last three are of
// version 2: tensors may be missing, and LAST_STATE is 1 for h_last. Exits with 1 and one line on
// standard error where the threads of a block or warp part ways, where an output is written by two blocks or by none.
// Out-of-bounds accesses are left to AddressSanitizer: every tensor is an allocation of its exact size.

#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

cuda_on_cpu::Index threadIdx, blockIdx;
extern "C" char __start_cuda_shared[], __stop_cuda_shared[];  // the linker's: the section of that name

namespace cuda_on_cpu {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

enum class Stop { kBarrier, kShuffle, kEnd };
const char* const kNames[] = {"__syncthreads", "__shfl_xor_sync", "the kernel's end"};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* sanitizer_state = nullptr;
  Stop stop = Stop::kEnd;
  int line = 0;
  int lanes = 0;  // of a shuffle: which lane's value is wanted, as an exclusive or
  float value = 0;
};

ucontext_t scheduler;
void* scheduler_state = nullptr;
const void* scheduler_stack;
size_t scheduler_stack_size;
std::vector<Fiber> fibers;
Fiber* running;
std::function<void()> kernel;

template <typename... Values>
[[noreturn]] void fail(const char* format, Values... values) {
  std::fprintf(stderr, format, values...);
  std::fputc('\n', stderr);
  std::exit(1);
}

// From the fiber that runs to the scheduler, until that resumes it.
void pause(Stop stop, int line) {
  Fiber& self = *running;
  self.stop = stop;
  self.line = line;
  __sanitizer_start_switch_fiber(stop == Stop::kEnd ? nullptr : &self.sanitizer_state, scheduler_stack,
                                 scheduler_stack_size);
  swapcontext(&self.context, &scheduler);
  __sanitizer_finish_switch_fiber(self.sanitizer_state, nullptr, nullptr);
}

void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  kernel();
  pause(Stop::kEnd, 0);
}

void resume(int thread) {
  running = &fibers[thread];
  threadIdx.x = thread;
  __sanitizer_start_switch_fiber(&scheduler_state, running->stack.get(), kStack);
  swapcontext(&scheduler, &running->context);
  __sanitizer_finish_switch_fiber(scheduler_state, nullptr, nullptr);
}

// All of the threads must be where the first one is.
void check_together(int first, int count) {
  const Fiber& expected = fibers[first];
  for (int thread = first; thread < first + count; ++thread) {
    const Fiber& found = fibers[thread];
    if (found.stop != expected.stop || found.line != expected.line || found.lanes != expected.lanes)
      fail("block (%u, %u, %u): thread %d waits at %s, line %d, thread %d at %s, line %d", blockIdx.x, blockIdx.y,
           blockIdx.z, first, kNames[int(expected.stop)], expected.line, thread, kNames[int(found.stop)], found.line);
  }
}

// Each lane in turn until it waits, and again after each shuffle, until the warp is at a barrier or at its end.
void run_warp(int first, bool backwards) {
  do {
    for (int lane = 0; lane < kWarp; ++lane) resume(first + (backwards ? kWarp - 1 - lane : lane));
    check_together(first, kWarp);
    if (fibers[first].stop == Stop::kShuffle) {
      float values[kWarp];
      for (int lane = 0; lane < kWarp; ++lane) values[lane] = fibers[first + lane].value;
      for (int lane = 0; lane < kWarp; ++lane) fibers[first + lane].value = values[lane ^ fibers[first].lanes];
    }
  } while (fibers[first].stop == Stop::kShuffle);
}

// A warp runs as far ahead of the others as barriers let it; in every other block it is the last warp that does.
void run_block(int threads) {
  memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);  // NaN
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.lanes = 0;
    makecontext(&fiber.context, enter, 0);
  }
  const bool backwards = (blockIdx.x + blockIdx.y) % 2;
  do {
    for (int warp = 0; warp < threads; warp += kWarp) run_warp(backwards ? threads - kWarp - warp : warp, backwards);
    check_together(0, threads);
  } while (fibers[0].stop != Stop::kEnd);
}

}  // namespace

void synchronize(int line) { pause(Stop::kBarrier, line); }

float shuffle_xor(unsigned mask, float value, int lanes, int line) {
  if (mask != 0xffffffffu || lanes <= 0 || lanes >= kWarp) fail("line %d: only whole warps can shuffle here", line);
  running->value = value;
  running->lanes = lanes;
  pause(Stop::kShuffle, line);
  running->lanes = 0;
  return running->value;
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::fail;

// Null where the file is missing and may be.
static std::unique_ptr<char[]> read(const std::string& path, size_t bytes, bool optional = false) {
  std::ifstream file(path, std::ios::binary);
  if (!file && optional) return nullptr;
  std::unique_ptr<char[]> data(new char[bytes]);
  if (!file.read(data.get(), bytes) || file.peek() != EOF) fail("%s must have %zu bytes", path.c_str(), bytes);
  return data;
}

// What the blocks write, each element by one of them.
struct Output {
  const char* name;
  size_t elements, width;
  std::unique_ptr<char[]> data{new char[elements * width]};
  std::vector<char> result = std::vector<char>(elements * width);
  std::vector<bool> written = std::vector<bool>(elements);
  // A NaN in every type, and none that arithmetic gives.
  std::vector<uint16_t> poison = std::vector<uint16_t>(elements * width / 2, 0x7fbd);

  void clear() { std::copy_n(reinterpret_cast<const char*>(poison.data()), elements * width, data.get()); }

  void collect() {
    for (size_t i = 0; i < elements; ++i) {
      if (!memcmp(data.get() + i * width, poison.data(), width)) continue;
      if (written[i]) fail("two blocks write %s[%zu]", name, i);
      written[i] = true;
      memcpy(result.data() + i * width, data.get() + i * width, width);
    }
  }

  void save(const std::string& folder) const {
    for (size_t i = 0; i < elements; ++i)
      if (!written[i]) fail("no block writes %s[%zu]", name, i);
    if (!std::ofstream(folder + name, std::ios::binary).write(result.data(), result.size()))
      fail("can't write %s", name);
  }
};

int main(int argc, char** argv) {
  if (argc != 10 && argc != 13) fail("%d arguments instead of 9 or 12", argc - 1);
  const std::string folder = std::string(argv[2]) + "/";
  int sizes[10] = {};
  for (int i = 0; i < argc - 3; ++i) sizes[i] = std::atoi(argv[3 + i]);
  const auto [batch, channels, length, states, width, threads, channels_per_block, some, softplus, last] = sizes;
  const int groups = some ? some : 1, in_group = channels / groups;
  void* const function = dlsym(RTLD_DEFAULT, argv[1]);
  if (!function) fail("there is no kernel %s", argv[1]);

  const size_t steps = size_t(batch) * channels * length, mixes = size_t(batch) * groups * states * length;
  const size_t all_states = size_t(batch) * channels * states;
  const auto u = read(folder + "u", steps * width), delta = read(folder + "delta", steps * width);
  const auto B = read(folder + "B", mixes * width), C = read(folder + "C", mixes * width);
  const auto A = read(folder + "A", size_t(channels) * states * 4), z = read(folder + "z", steps * width, some);
  const auto D = read(folder + "D", channels * 4, some), bias = read(folder + "delta_bias", channels * 4, some);
  const auto h0 = some ? read(folder + "h0", all_states * 4, true) : nullptr;
  Output y{"y", steps, size_t(width)}, h_last{"h_last", last ? all_states : 0, 4};

  const auto as_floats = [](const auto& data) { return reinterpret_cast<float*>(data.get()); };
  cuda_on_cpu::kernel = [&, length = length, states = states, some = some, softplus = softplus, last = last] {
    using Kernel = void(const void*, const void*, const float*, const void*, const void*, const float*, const void*,
                        const float*, int, int, int, void*);
    using Kernel2 = void(const void*, const void*, const float*, const void*, const void*, const float*, const void*,
                         const float*, const float*, int, int, int, int, int, void*, float*);
    if (some)
      reinterpret_cast<Kernel2*>(function)(u.get(), delta.get(), as_floats(A), B.get(), C.get(), as_floats(D), z.get(),
                                           as_floats(bias), as_floats(h0), in_group, length, states, groups, softplus,
                                           y.data.get(), last ? as_floats(h_last.data) : nullptr);
    else
      reinterpret_cast<Kernel*>(function)(u.get(), delta.get(), as_floats(A), B.get(), C.get(), as_floats(D), z.get(),
                                          as_floats(bias), in_group, length, states, y.data.get());
  };
  cuda_on_cpu::fibers = std::vector<cuda_on_cpu::Fiber>(threads);
  for (blockIdx.x = 0; blockIdx.x < unsigned(batch); ++blockIdx.x)
    for (blockIdx.y = 0; blockIdx.y * channels_per_block < unsigned(in_group); ++blockIdx.y)
      for (blockIdx.z = 0; blockIdx.z < unsigned(groups); ++blockIdx.z) {
        y.clear(), h_last.clear();
        cuda_on_cpu::run_block(threads);
        y.collect(), h_last.collect();
      }
  y.save(folder);
  if (last) h_last.save(folder);
}
