// What the C interfaces of all operators share: instruction sets, the status of a call, the host's threads. A host is
// whoever calls and lends threads: ONNX Runtime, PyTorch, a test.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

// Which build of a kernel runs. MDNET_BEST takes the widest that this processor has.
enum MdnetIsa { MDNET_BEST = 0, MDNET_PORTABLE = 1, MDNET_AVX2 = 2, MDNET_AVX512 = 3 };

enum MdnetStatus { MDNET_OK = 0, MDNET_NO_MEMORY = 1, MDNET_NO_ISA = 2, MDNET_BAD_ARGUMENT = 3 };

// Runs task(argument, i) for every i below count, on whatever threads the host has, and returns when all are done.
// Functions with such a parameter accept null, and then run on the calling thread.
typedef void (*MdnetParallelFor)(void* host, void (*task)(void* argument, size_t i), void* argument, size_t count);

// The widest MdnetIsa of this processor and build.
int mdnet_isa(void);
}
