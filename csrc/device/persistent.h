// SPDX-License-Identifier: Apache-2.0
// Launch of the persistent kernels. T, a kernel's traits: kThreads, kSmemBytes, kClusterSize.
#pragma once

#include "device/launch.h"

namespace spense::cuda {

// A persistent kernel of T's shape, which loads before the kernel ahead is done.
template <class T, typename Params>
void launch_persistent(void (*kernel)(Params), int clusters, Stream stream, const Params& params) {
  allow_smem(kernel, T::kSmemBytes);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(clusters * T::kClusterSize));
  shape.block = dim3(T::kThreads);
  shape.smem_bytes = T::kSmemBytes;
  shape.cluster = T::kClusterSize;
  shape.dependent = true;
  launch(kernel, shape, stream, params);
}

template <class T, typename Params>
int max_clusters_of(void (*kernel)(Params)) {
  allow_smem(kernel, T::kSmemBytes);
  return max_clusters(kernel, dim3(T::kThreads), T::kSmemBytes, T::kClusterSize);
}

}  // namespace spense::cuda
