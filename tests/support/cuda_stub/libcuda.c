// A CUDA driver without a GPU: it has the entries that the library uses, and notes what they are called with.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char record[1 << 16];
static long context = 1, modules = 0;
static int refusal = 0;
static const char* image = "";

struct function {
  long module;
  char name[128];
};

void stub_set_context(long value) { context = value; }
void stub_refuse(int code) { refusal = code; }  // the next launches
const char* stub_record(void) { return record; }
const char* stub_image(void) { return image; }

// A device is there where STUB_GPU names its compute capability: 90 is 9.0.
static int capability(void) {
  const char* value = getenv("STUB_GPU");
  return value ? atoi(value) : 0;
}

int cuInit(unsigned flags) { return flags || !capability() ? 100 : 0; }

int cuDeviceGetCount(int* count) {
  *count = getenv("STUB_GPUS") ? atoi(getenv("STUB_GPUS")) : 1;
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = 0;
  return ordinal ? 101 : 0;
}

int cuDeviceGetName(char* name, int length, int device) {
  snprintf(name, length, "Stub GPU");
  return device;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? capability() / 10 : attribute == 76 ? capability() % 10 : -1;
  return device;
}

int cuDriverGetVersion(int* version) {
  *version = 13020;
  return 0;
}

int cuCtxGetCurrent(void** out) {
  *out = (void*)context;
  return context ? 0 : 201;
}

int cuDevicePrimaryCtxRetain(void** out, int device) {
  *out = (void*)1;
  return device ? 101 : 0;
}

int cuCtxSetCurrent(void* value) {
  context = (long)value;
  return 0;
}

int cuCtxSynchronize(void) { return 0; }

int cuMemAlloc_v2(unsigned long long* address, size_t size) {
  if (!context) return 201;
  *address = (unsigned long long)malloc(size);
  return 0;
}

int cuMemcpyHtoD_v2(unsigned long long to, const void* from, size_t size) {
  memcpy((void*)to, from, size);
  return 0;
}

int cuMemcpyDtoH_v2(void* to, unsigned long long from, size_t size) {
  memcpy(to, (const void*)from, size);
  return 0;
}

int cuModuleLoadData(void** module, const void* text) {
  image = strdup(text);  // a driver, too, does not need it any longer
  *module = (void*)++modules;
  sprintf(record + strlen(record), "load module %ld in context %ld\n", modules, context);
  return 0;
}

int cuModuleGetFunction(void** out, void* module, const char* name) {
  char entry[160];
  snprintf(entry, sizeof entry, ".entry %s(", name);
  if (!strstr(image, entry)) return 500;
  struct function* made = malloc(sizeof *made);
  made->module = (long)module;
  snprintf(made->name, sizeof made->name, "%s", name);
  *out = made;
  return 0;
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
  const struct function* kernel = function;
  if (refusal) return refusal;
  sprintf(record + strlen(record),
          "launch %s of module %ld grid %u %u %u block %u %u %u shared %u stream %ld extra %d with", kernel->name,
          kernel->module, gx, gy, gz, bx, by, bz, shared, (long)stream, extra != NULL);
  const int version_2 = strncmp(kernel->name, "selective_scan2_", 16) == 0;
  const int count = version_2 ? 16 : 12, first_scalar = version_2 ? 9 : 8, scalars = version_2 ? 5 : 3;
  for (int i = 0; i < count; ++i) {
    const int scalar = first_scalar <= i && i < first_scalar + scalars;
    sprintf(record + strlen(record), " %ld", scalar ? (long)*(int*)arguments[i] : (long)*(void**)arguments[i]);
  }
  strcat(record, "\n");
  return 0;
}

// ONNX Runtime's CUDA provider links to it.
int cuTensorMapEncodeTiled(void) { return 801; }

int cuGetErrorString(int code, const char** text) {
  *text = code == 500 ? "named symbol not found" : code == 201 ? "invalid device context" : "out of memory";
  return 0;
}
