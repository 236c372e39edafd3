// Faults as a kernel might have them, for the proof that the sanitizers see them where they are loaded into Python.
#include <cstddef>

extern "C" {

// Reads one element too many.
float past_the_end(const float* x, size_t count) {
  float sum = 0;
  for (size_t i = 0; i <= count; ++i) sum += x[i];
  return sum;
}

// Shifts by more bits than there are.
int shifted_too_far(int by) { return 1 << by; }

// Every task adds to one number.
void shared_sum(void (*parallel_for)(void*, void (*)(void*, size_t), void*, size_t), float* sum) {
  parallel_for(nullptr, [](void* to, size_t i) { *static_cast<float*>(to) += float(i); }, sum, 100);
}

}  // extern "C"
