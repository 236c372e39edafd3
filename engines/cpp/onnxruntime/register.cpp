// The entry for ONNX Runtime, which looks RegisterCustomOps up by its name. A node of our operators then runs the
// kernel here, although its file also has a function body.
#include <pthread.h>

#include <initializer_list>

#include "onnxruntime/op.h"

namespace {

// Made once in a process; sessions keep pointers to it.
OrtCustomOpDomain* domain = nullptr;
pthread_mutex_t domain_mutex = PTHREAD_MUTEX_INITIALIZER;

OrtStatus* make_domain(const OrtApi& api) {
  OrtCustomOpDomain* made = nullptr;
  MDNET_TRY(api.CreateCustomOpDomain("mdnet", &made));
  for (const auto add :
       {add_selective_scan, add_matmul, add_attention, add_quantised, add_conv, add_winograd, add_resnet}) {
    MDNET_TRY(add(made, api));
  }
  domain = made;
  return nullptr;
}

}  // namespace

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (!api) {  // an older one; every version's table starts with CreateStatus
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "the mdnet operators need ONNX Runtime 1.20 or newer");
  }
  pthread_mutex_lock(&domain_mutex);
  OrtStatus* status = domain ? nullptr : make_domain(*api);
  pthread_mutex_unlock(&domain_mutex);
  return status ? status : api->AddCustomOpDomain(options, domain);
}
