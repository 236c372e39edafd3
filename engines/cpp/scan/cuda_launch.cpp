// Launches selective_scan.cu. The CUDA driver's entries are declared here: building this library needs no CUDA, and
// loading it no GPU.

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "scan/scan.h"

// The PTX of mdnet_engines/cuda/, with a zero at the end.
asm(R"(
  .section .rodata
  .global mdnet_ptx
  .hidden mdnet_ptx
mdnet_ptx:
  .incbin ")" MDNET_PTX_FILE R"("
  .byte 0
  .previous
)");
extern "C" __attribute__((visibility("hidden"))) const char mdnet_ptx[];

namespace {

// What the PTX was compiled for; tests/engines/cuda/test_launch.py compares them.
constexpr unsigned kThreads = 128;
constexpr int64_t kMaxStates = 64, kMaxLength = 1 << 25;
constexpr int64_t kMaxGroups = 65535;  // a grid's third size
// Launches of at most so many blocks take a kernel whose blocks have fewer channels, if there is one.
constexpr int64_t kChannelsPerBlock = 32, kSmallChannelsPerBlock = 8, kSmallBlocks = 216;

using CUresult = int;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;

struct Driver {
  CUresult (*cuCtxGetCurrent)(CUcontext*);
  CUresult (*cuModuleLoadData)(CUmodule*, const void* image);
  CUresult (*cuModuleGetFunction)(CUfunction*, CUmodule, const char* name);
  CUresult (*cuLaunchKernel)(CUfunction, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                             void** extra);
  CUresult (*cuGetErrorString)(CUresult, const char** text);
  bool complete;  // every entry was found
};

Driver loaded = {};

template <typename F>
bool find(void* library, const char* name, F* function) {
  *function = reinterpret_cast<F>(dlsym(library, name));
  return *function != nullptr;
}

void load_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  loaded.complete = library && find(library, "cuCtxGetCurrent", &loaded.cuCtxGetCurrent) &&
                    find(library, "cuModuleLoadData", &loaded.cuModuleLoadData) &&
                    find(library, "cuModuleGetFunction", &loaded.cuModuleGetFunction) &&
                    find(library, "cuLaunchKernel", &loaded.cuLaunchKernel) &&
                    find(library, "cuGetErrorString", &loaded.cuGetErrorString);
}

const Driver& driver() {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, load_driver);
  return loaded;
}

const char* explain(const char* doing, CUresult result) {
  static thread_local char text[256];
  const char* reason = nullptr;
  if (driver().cuGetErrorString(result, &reason) != 0 || !reason) reason = "unknown error";
  snprintf(text, sizeof text, "the CUDA driver failed %s: %s (%d)", doing, reason, result);
  return text;
}

// The module of each context: one for each GPU in use, kept until the process ends.
struct Module {
  CUcontext context;
  CUmodule module;
  Module* next;
};

Module* modules = nullptr;
pthread_mutex_t modules_mutex = PTHREAD_MUTEX_INITIALIZER;

CUresult load_module(CUcontext context, CUmodule* module) {
  for (const Module* known = modules; known; known = known->next) {
    if (known->context == context) {
      *module = known->module;
      return 0;
    }
  }
  if (CUresult result = driver().cuModuleLoadData(module, mdnet_ptx)) return result;
  if (Module* added = static_cast<Module*>(malloc(sizeof(Module)))) {
    *added = {context, *module, modules};
    modules = added;
  }
  return 0;
}

CUresult current_module(CUmodule* module) {
  CUcontext context = nullptr;
  if (CUresult result = driver().cuCtxGetCurrent(&context)) return result;
  pthread_mutex_lock(&modules_mutex);
  const CUresult result = load_module(context, module);
  pthread_mutex_unlock(&modules_mutex);
  return result;
}

int64_t blocks_for(int64_t channels, int64_t per_block) { return (channels + per_block - 1) / per_block; }

// Version 1 has kernels of its own, which know no null pointers.
bool is_version_1(const MdnetScan& scan) {
  return scan.groups <= 1 && !scan.no_softplus && !scan.h0 && !scan.h_last && scan.z.data && scan.D && scan.delta_bias;
}

}  // namespace

extern "C" const char* mdnet_scan_cuda(const MdnetScan* call, void* stream) {
  MdnetScan scan = *call;  // the driver wants addresses of arguments that are not const
  if (scan.type == MDNET_FLOAT64) return "the CUDA selective scan takes no float64";
  if (scan.states > kMaxStates) return "the CUDA selective scan takes at most 64 states";
  if (scan.length >= kMaxLength) return "the CUDA selective scan takes fewer than 2^25 steps";
  if (scan.groups > kMaxGroups) return "the CUDA selective scan takes at most 65535 groups";
  if (!driver().complete) return "libcuda.so.1 can't be loaded; is the NVIDIA driver installed?";
  CUmodule module;
  if (CUresult result = current_module(&module)) return explain("to load the selective scan", result);
  const bool version_1 = is_version_1(scan);
  int groups = scan.groups > 1 ? scan.groups : 1, softplus = !scan.no_softplus;
  int channels = int(scan.channels / groups), length = int(scan.length), states = int(scan.states);
  const char* type = scan.type == MDNET_FLOAT32 ? "f32" : scan.type == MDNET_FLOAT16 ? "f16" : "bf16";
  const int capacity = states <= 4 ? 4 : states <= 16 ? 16 : 64;
  const bool small =
      version_1 && capacity == 16 && scan.batch * blocks_for(channels, kSmallChannelsPerBlock) <= kSmallBlocks;
  char name[64];
  snprintf(name, sizeof name, "selective_scan%s_%s_%s_n%d%s", version_1 ? "" : "2",
           scan.reverse ? "reverse" : "forward", type, capacity, small ? "_small" : "");
  CUfunction kernel;
  if (CUresult result = driver().cuModuleGetFunction(&kernel, module, name)) return explain("to find a kernel", result);

  void* arguments_1[] = {&scan.u.data, &scan.delta.data, &scan.A,   &scan.B.data, &scan.C.data, &scan.D,
                         &scan.z.data, &scan.delta_bias, &channels, &length,      &states,      &scan.y};
  void* arguments_2[] = {&scan.u.data, &scan.delta.data, &scan.A,  &scan.B.data, &scan.C.data, &scan.D,
                         &scan.z.data, &scan.delta_bias, &scan.h0, &channels,    &length,      &states,
                         &groups,      &softplus,        &scan.y,  &scan.h_last};
  const int64_t blocks = blocks_for(channels, small ? kSmallChannelsPerBlock : kChannelsPerBlock);
  if (CUresult result =
          driver().cuLaunchKernel(kernel, unsigned(scan.batch), unsigned(blocks), unsigned(groups), kThreads, 1, 1, 0,
                                  stream, version_1 ? arguments_1 : arguments_2, nullptr)) {
    return explain("to launch the selective scan", result);
  }
  return nullptr;
}
