// SPDX-License-Identifier: Apache-2.0
// launch.cpp wants the kernels; nothing is launched here.
#include "device/stream.h"
#include "sm100/params.h"

namespace spense::sm100 {
#define INSTANCE(name, ...)                          \
  void launch_##name(const Params&, cuda::Stream) {} \
  int max_clusters_##name() { return 0; }
#include "heuristics/sm100_instances.def"
#undef INSTANCE
}  // namespace spense::sm100
