// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace spense::cuda {

inline void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  throw std::runtime_error(std::string("spense: ") + what + ": " + cudaGetErrorName(code) + ", " +
                           cudaGetErrorString(code));
}

}  // namespace spense::cuda

// Runs a CUDA call and throws with its text when it fails.
#define SPENSE_CUDA(call) ::spense::cuda::check((call), #call)
