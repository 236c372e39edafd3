// What each build of kernel_per_isa.cpp offers to scan.cpp.
#pragma once

#include "scan/scan.h"

constexpr int64_t kSplitChannels = 128;  // channels of a task of the backward pass, whatever the width of vectors

struct ScanKernel {
  // The number of tasks of the forward pass, and the work of one. Tasks may run at the same time.
  int64_t (*forward_tasks)(const MdnetScan& scan);
  int (*forward)(const MdnetScan& scan, int64_t task);  // MdnetStatus
  // The backward pass has one task for each image and split.
  int (*backward)(const MdnetScan& scan, const MdnetScanGradients& gradients, int64_t task);
};
