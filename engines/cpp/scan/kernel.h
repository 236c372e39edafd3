// What each build of scan_kernel.cpp offers to dispatch.cpp.
#pragma once

#include "scan/scan.h"

constexpr int64_t kSplitChannels = 128;  // channels of one task of the backward pass, whatever the vectors' width

struct MdnetKernel {
  // Tasks of the forward pass, and the work of one. Any number may run at once. Both give a MdnetStatus.
  int64_t (*forward_tasks)(const MdnetScan& scan);
  int (*forward)(const MdnetScan& scan, int64_t task);
  // The backward pass has one task for each image and split.
  int (*backward)(const MdnetScan& scan, const MdnetScanGradients& gradients, int64_t task);
};

extern const MdnetKernel mdnet_portable_kernel;
extern const MdnetKernel mdnet_avx2_kernel;
extern const MdnetKernel mdnet_avx512_kernel;
