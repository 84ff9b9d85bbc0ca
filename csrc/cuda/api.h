// SPDX-License-Identifier: Apache-2.0
// What libspense_cuda shows to its callers. They see no CUDA header: a stream is a cudaStream_t
// passed as void*, and the device is the current one. Failures throw std::runtime_error.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "device/stream.h"

#define SPENSE_API __attribute__((visibility("default")))

namespace spense::cuda {

// Compute capability of the current device, 90 for 9.0, its number of multiprocessors and its
// index.
struct DeviceInfo {
  int arch = 0, multiprocessors = 0, index = 0;
};
SPENSE_API DeviceInfo device_info();

// Whether the stream is being captured into a graph, and which capture that is.
struct CaptureInfo {
  bool active = false;
  uint64_t id = 0;
};
SPENSE_API CaptureInfo capture_info(Stream stream);

// Device memory that is never freed, also while some stream is being captured. Uninitialised.
SPENSE_API void* permanent_memory(int64_t bytes);

SPENSE_API void fill_zero(void* memory, int64_t bytes, Stream stream);

}  // namespace spense::cuda
