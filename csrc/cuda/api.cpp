// SPDX-License-Identifier: Apache-2.0
#include "cuda/api.h"

#include <array>
#include <atomic>

#include "device/check.h"

namespace spense::cuda {

DeviceInfo device_info() {
  // Attributes never change, so that a race only writes the same numbers twice.
  constexpr int kDevices = 64;
  static std::array<std::atomic<int>, kDevices> arch_of, multiprocessors_of;
  int device = 0;
  SPENSE_CUDA(cudaGetDevice(&device));
  const auto read = [&] {
    int major = 0, minor = 0;
    DeviceInfo info;
    SPENSE_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    SPENSE_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    SPENSE_CUDA(
        cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    info.arch = major * 10 + minor;
    info.index = device;
    return info;
  };
  if (device >= kDevices) return read();
  if (multiprocessors_of[device].load(std::memory_order_acquire) == 0) {
    const DeviceInfo info = read();
    arch_of[device].store(info.arch, std::memory_order_relaxed);
    multiprocessors_of[device].store(info.multiprocessors, std::memory_order_release);
  }
  return {arch_of[device].load(std::memory_order_relaxed),
          multiprocessors_of[device].load(std::memory_order_relaxed), device};
}

CaptureInfo capture_info(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  SPENSE_CUDA(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id));
  return {status == cudaStreamCaptureStatusActive, id};
}

void* permanent_memory(int64_t bytes) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  SPENSE_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
  void* memory = nullptr;
  const cudaError_t code = cudaMalloc(&memory, static_cast<size_t>(bytes));
  SPENSE_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
  check(code, "cudaMalloc");
  return memory;
}

void fill_zero(void* memory, int64_t bytes, Stream stream) {
  SPENSE_CUDA(
      cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

}  // namespace spense::cuda
