// Memory that is freed at the end of its scope. Allocation never throws, since the library is built without exceptions:
// a buffer that got no memory is false.
#pragma once

#include <stdint.h>
#include <stdlib.h>

namespace {

constexpr size_t kAlignment = 64;  // bytes: a cache line, and the widest vector

inline size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Memory for `count` elements, for the caller to free(); null where there is none left.
template <typename T>
T* allocate(size_t count) {
  return static_cast<T*>(aligned_alloc(kAlignment, aligned(count * sizeof(T))));
}

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(count ? allocate<T>(size_t(count)) : nullptr) {}
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  explicit operator bool() const { return data_; }
  T* data() const { return data_; }

 protected:
  explicit Buffer(void* data) : data_(static_cast<T*>(data)) {}

 private:
  T* const data_;
};

// Filled with zeros, and not aligned.
template <typename T>
class ZeroedBuffer : public Buffer<T> {
 public:
  explicit ZeroedBuffer(int64_t count) : Buffer<T>(calloc(size_t(count), sizeof(T))) {}
};

}  // namespace
