// Memory for one task in one allocation: sized first, then handed out piece by piece.
#pragma once

#include "common/buffer.h"

namespace {

class Arena {
 public:
  explicit Arena(size_t bytes) : Arena(bytes, nullptr, 0) {}
  ~Arena() {
    if (memory_ != local_) free(memory_);
  }
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

 protected:
  Arena(size_t bytes, char* local, size_t local_size)
      : local_(local), memory_(bytes <= local_size ? local : allocate<char>(bytes)), next_(memory_) {}

 private:
  char* const local_;
  char* const memory_;
  char* next_;
};

// It allocates only where `size` bytes of its own do not do.
template <size_t size>
class LocalArena : public Arena {
 public:
  explicit LocalArena(size_t bytes) : Arena(bytes, own_, size) {}

 private:
  alignas(kAlignment) char own_[size];
};

}  // namespace
