// Subnormal results are 0 for a while.
#pragma once

namespace {

// While one exists, results too small for a normal number are 0: a state that decays into subnormal numbers would slow
// x86 processors down twentyfold. Subnormal operands keep their value (unless the caller has changed that), because
// float16 is widened through them.
class FlushToZero {
 public:
#if defined(__x86_64__)
  FlushToZero() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr((before_ | 0x8000) & ~0x0040u); }
  ~FlushToZero() { __builtin_ia32_ldmxcsr(before_); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  const unsigned before_;
#endif
};

}  // namespace
