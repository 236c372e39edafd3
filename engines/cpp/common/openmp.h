// The threads of an OpenMP runtime that the process has loaded (PyTorch's) as a host.
#pragma once

#include <atomic>

#include "common/parallel.h"

namespace {

class OpenMp {
 public:
  // GOMP_parallel, which GNU's and LLVM's runtime both export: run `function` on `threads` threads and wait for all.
  using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

  // Without `parallel` (null) tasks run on the calling thread.
  OpenMp(Parallel parallel, int threads) : parallel_(parallel), threads_(threads) {}
  Host host() { return {parallel_ && threads_ > 1 ? parallel_for : nullptr, this}; }

 private:
  struct Loop {
    void (*task)(void*, size_t);
    void* argument;
    size_t count;
    std::atomic<size_t> next{0};
  };

  static void work(void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    // Relaxed: tasks share nothing, and the start and end of the team order them with everything else.
    for (size_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count;) loop.task(loop.argument, i);
  }

  static void parallel_for(void* host, void (*task)(void*, size_t), void* argument, size_t count) {
    const OpenMp& self = *static_cast<const OpenMp*>(host);
    if (count == 1) return task(argument, 0);
    Loop loop{task, argument, count};
    // All threads, even for fewer tasks: libgomp ends the threads that a smaller team does not need, and the host's
    // next operation would start them again.
    self.parallel_(work, &loop, unsigned(self.threads_), 0);
  }

  const Parallel parallel_;
  const int threads_;
};

}  // namespace
