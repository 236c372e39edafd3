// What each build of kernel_per_isa.cpp offers to scan.cpp.
#pragma once

#include "common/arithmetic.h"
#include "scan/scan.h"

constexpr int64_t kSplitChannels = 128;  // channels of a task of the backward pass, whatever the width of vectors

namespace {

inline int64_t groups_of(const MdnetScan& scan) { return larger(scan.groups, 1); }
inline int64_t channels_of_a_group(const MdnetScan& scan) { return scan.channels / groups_of(scan); }

}  // namespace

struct ScanKernel {
  // The number of tasks of the forward pass, and the work of one. Tasks may run at the same time.
  int64_t (*forward_tasks)(const MdnetScan& scan);
  int (*forward)(const MdnetScan& scan, int64_t task);  // MdnetStatus
  // The backward pass has one task for each image, group of B and C, and split of its channels.
  int (*backward)(const MdnetScan& scan, const MdnetScanGradients& gradients, int64_t task);
};
