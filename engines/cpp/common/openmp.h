// The threads of an OpenMP runtime that the process has loaded, as a host of tasks.
#pragma once

#include <atomic>

#include "common/parallel.h"

namespace {

class OpenMp {
 public:
  // GOMP_parallel of GNU's runtime, which LLVM's has too: run `function` on `threads` threads at once and wait for all.
  using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

  // On the calling thread where `parallel` is null.
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
    // Relaxed: tasks share nothing, and are ordered by the team's start and end.
    for (size_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count;) loop.task(loop.argument, i);
  }

  static void parallel_for(void* host, void (*task)(void*, size_t), void* argument, size_t count) {
    const OpenMp& self = *static_cast<const OpenMp*>(host);
    if (count == 1) return task(argument, 0);
    Loop loop{task, argument, count};
    // All threads, even for fewer tasks: libgomp ends the threads that a smaller team leaves over, and the host's next
    // operation would start them again.
    self.parallel_(work, &loop, unsigned(self.threads_), 0);
  }

  const Parallel parallel_;
  const int threads_;
};

}  // namespace
