// Hosts of the kernels' tasks whose threads a sanitizer can follow. It can't follow those of libgomp and ONNX Runtime,
// which hand work over by atomics in code that is not instrumented: every access would seem to be a race.
#include <pthread.h>
#include <stdlib.h>

#include <atomic>
#include <cstddef>

namespace {

constexpr int kThreads = 4;

struct Team {
  void (*function)(void*);
  void* data;
};

void* member(void* team) {
  const Team& of = *static_cast<Team*>(team);
  of.function(of.data);
  return nullptr;
}

struct Loop {
  void (*task)(void*, size_t);
  void* argument;
  size_t count;
  std::atomic<size_t> members{0};
};

// Every thread has its share, however busy the machine is. Relaxed, so that nothing orders two threads' tasks: one that
// reads what another wrote is a race, whichever came first.
void work(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  size_t i = loop.members.fetch_add(1, std::memory_order_relaxed);
  for (; i < loop.count; i += kThreads) loop.task(loop.argument, i);
}

}  // namespace

extern "C" {

// As GOMP_parallel, but for the number of threads.
void team_parallel(void (*function)(void*), void* data, unsigned, unsigned) {
  Team team{function, data};
  pthread_t threads[kThreads];
  for (pthread_t& thread : threads) {
    if (pthread_create(&thread, nullptr, member, &team)) abort();
  }
  for (pthread_t thread : threads) pthread_join(thread, nullptr);
}

// An MdnetParallelFor.
void team_parallel_for(void*, void (*task)(void*, size_t), void* argument, size_t count) {
  Loop loop{task, argument, count};
  team_parallel(work, &loop, kThreads, 0);
}

}  // extern "C"
