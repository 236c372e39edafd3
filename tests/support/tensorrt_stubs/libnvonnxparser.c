// Stands in for libnvonnxparser.so.11, TensorRT's ONNX parser: nothing can be parsed with it.

#include <stddef.h>

void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version) { return NULL; }
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int version) { return NULL; }
int getNvOnnxParserVersion(void) { return 11; }
