// SPDX-License-Identifier: Apache-2.0
// Launch of a kernel that may overlap the end of the one before it.
#pragma once

#include <cuda_runtime.h>

#include "device/check.h"
#include "device/stream.h"

namespace spense::cuda {

struct LaunchShape {
  dim3 grid, block;
  int smem_bytes = 0;
  int cluster = 1;         // CTAs of a cluster, along grid.x
  bool dependent = false;  // programmatic dependent launch
};

template <typename... Args>
void launch(void (*kernel)(Args...), const LaunchShape& shape, Stream stream, const Args&... args) {
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (shape.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = static_cast<size_t>(shape.smem_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = static_cast<unsigned>(count);
  SPENSE_CUDA(cudaLaunchKernelEx(&config, kernel, args...));
}

// Dynamic shared memory above 48 KiB has to be allowed once a kernel and device; the call is cheap.
template <typename... Args>
void allow_smem(void (*kernel)(Args...), int bytes) {
  SPENSE_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Clusters of a kernel that the current device holds at a time; asked for once a device.
template <typename... Args>
int max_clusters(void (*kernel)(Args...), dim3 block, int smem_bytes, int cluster) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  SPENSE_CUDA(cudaOccupancyMaxActiveClusters(&count, kernel, &config));
  return count;
}

}  // namespace spense::cuda
