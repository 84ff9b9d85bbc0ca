// SPDX-License-Identifier: Apache-2.0
// Element types at the edges of the kernels. Plain C++20: no torch, no CUDA.
#pragma once

#include <cstdint>

namespace spense {

enum class FloatType : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };
using InType = FloatType;   // of the tensor that quantize_fp8 reads
using OutType = FloatType;  // of the tensor that hybrid_gemm writes

constexpr int64_t bytes_of(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

constexpr const char* name_of(FloatType type) {
  return type == FloatType::kBFloat16  ? "bfloat16"
         : type == FloatType::kFloat16 ? "float16"
                                       : "float32";
}

}  // namespace spense
