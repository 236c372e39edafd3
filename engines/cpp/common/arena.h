// Memory for one task in one allocation: sized first, then handed out piece by piece.
#pragma once

#include "common/buffer.h"

namespace {

class Arena {
 public:
  explicit Arena(size_t bytes) : memory_(allocate<char>(bytes)), next_(memory_) {}
  ~Arena() { free(memory_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  explicit operator bool() const { return memory_; }

  // Pieces are aligned, so one may use up to kAlignment bytes more than its elements take.
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += aligned(size_t(count) * sizeof(T));
    return piece;
  }

 private:
  char* memory_;
  char* next_;
};

}  // namespace
