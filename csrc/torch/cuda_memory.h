// SPDX-License-Identifier: Apache-2.0
// Streams and scratch memory of the CUDA ops, through torch's allocator.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <vector>

#include "cuda/api.h"
#include "torch/common.h"

namespace spense::ops {

// Makes the tensor's device the current one and holds torch's current stream of it.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor);
  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

// Uninitialised, on the device of `like`.
Tensor empty_cuda(const std::vector<int64_t>& shape, ScalarType type, const Tensor& like);

// A copy on the device of `like`, made before this returns.
Tensor to_device(const void* host, int64_t bytes, const Tensor& like);

// `count` counters that are zero, that no launch of another stream uses, and that a captured graph
// keeps for itself. Kernels leave them at zero.
uint32_t* zero_counters(int64_t count, const Tensor& like, cuda::Stream stream);

}  // namespace spense::ops
