// SPDX-License-Identifier: Apache-2.0
// Takes the place of csrc/device/launch.h: a launch is a run of the machine.
#pragma once

#include <cuda_runtime.h>

#include "device/stream.h"

namespace spense::cuda {

struct LaunchShape {
  dim3 grid, block;
  int smem_bytes = 0;
  int cluster = 1;
  bool dependent = false;
};

template <typename Kernel>
void allow_smem(Kernel, int) {}

template <typename... Args>
int max_clusters(void (*)(Args...), dim3, int, int) {
  return 0;  // unknown
}

template <typename... Args>
void launch(void (*kernel)(Args...), const LaunchShape& shape, Stream, const Args&... args) {
  model::Launch launch;
  launch.grid = static_cast<int>(shape.grid.x);
  launch.block = static_cast<int>(shape.block.x);
  launch.cluster = shape.cluster;
  launch.smem_bytes = shape.smem_bytes;
  model::machine().run(launch, [&] { kernel(args...); });
}

}  // namespace spense::cuda
