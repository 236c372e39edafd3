// Stands in for libnvinfer.so.11, TensorRT's builder: nothing can be built with it, but the plugin registry is the real
// one, of the lean runtime.

#include <dlfcn.h>
#include <stddef.h>

void* createInferBuilder_INTERNAL(void* logger, int version) { return NULL; }
void* createInferRefitter_INTERNAL(void* engine, void* logger, int version) { return NULL; }
void* createInferRuntime_INTERNAL(void* logger, int version) { return NULL; }

static void* lean_registry(void) {
  void* lean = dlopen("libnvinfer_lean.so.11", RTLD_NOW);
  void* (*get)(void) = lean ? (void* (*)(void))dlsym(lean, "getPluginRegistry") : NULL;
  return get ? get() : NULL;
}

void* getPluginRegistry(void) { return lean_registry(); }
void* getBuilderPluginRegistry(int capability) { return lean_registry(); }
