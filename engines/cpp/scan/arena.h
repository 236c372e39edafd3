// Memory for one task of the scan: sized first, then handed out piece by piece.
#pragma once

#include "common/buffer.h"

namespace {

class Arena {
 public:
  explicit Arena(int64_t bytes) : memory_(bytes), next_(memory_.data()) {}
  explicit operator bool() const { return bool(memory_); }

  // Up to kAlignment bytes more are used than the elements take.
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += round_up(count * int64_t(sizeof(T)), kAlignment);
    return piece;
  }

 private:
  Buffer<char> memory_;
  char* next_;
};

}  // namespace
