// Tasks on the host's threads.
#pragma once

#include <atomic>

#include "common/interface.h"

namespace {

struct Host {
  MdnetParallelFor parallel_for;
  void* self;

  // Run task(i) for every i below count, and return when all are done.
  template <typename Task>
  void run(int64_t count, const Task& task) const {
    if (!parallel_for) {
      for (int64_t i = 0; i < count; ++i) task(i);
    } else if (count > 0) {
      parallel_for(
          self, [](void* task, size_t i) { (*static_cast<const Task*>(task))(int64_t(i)); }, const_cast<Task*>(&task),
          size_t(count));
    }
  }

  // The same with tasks that return an MdnetStatus. Returns MDNET_OK, or the status of a task that failed.
  template <typename Task>
  int run_and_check(int64_t count, const Task& task) const {
    std::atomic<int> status{MDNET_OK};
    run(count, [&](int64_t i) {
      if (const int result = task(i)) status = result;
    });
    return status;
  }
};

}  // namespace
