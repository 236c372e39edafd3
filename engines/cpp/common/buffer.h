// Memory that is freed at the end of its scope. Nothing throws here: whoever allocates asks whether it got any.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common/arithmetic.h"

namespace {

constexpr int64_t kAlignment = 64;  // bytes: a line of the cache, and the widest vector

// Memory for `count` elements, to be freed by free(); null where there is none.
template <typename T>
T* allocate(int64_t count) {
  return static_cast<T*>(aligned_alloc(kAlignment, size_t(round_up(count * int64_t(sizeof(T)), kAlignment))));
}

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(count ? allocate<T>(count) : nullptr) {}
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  explicit operator bool() const { return data_; }
  T* data() const { return data_; }

 private:
  T* const data_;
};

// The same, filled with zeros.
template <typename T>
class ZeroedBuffer : public Buffer<T> {
 public:
  explicit ZeroedBuffer(int64_t count) : Buffer<T>(count) {
    if (*this) memset(this->data(), 0, size_t(count) * sizeof(T));
  }
};

}  // namespace
