// SPDX-License-Identifier: Apache-2.0
// One hybrid GEMM on a GPU, as every architecture's launch takes it.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace spense {

//   y[m, n] = ((sum_k x[m, k] * w[n, k]) * x_scale[m]) * w_scale[n] + bias[n]
struct GemmArgs {
  int64_t m = 0, n = 0, k = 0;  // all at least 1
  const uint8_t* x = nullptr;   // [m, k] e4m3 in gather order, 16-byte aligned
  int64_t x_stride = 0;         // bytes, a multiple of 16
  const uint8_t* w = nullptr;   // tile stream, 16-byte aligned
  int64_t w_bytes = 0;
  const int32_t* tiles = nullptr;  // [tile_count(n) + 1, 4], 16-byte aligned
  const float* x_scale = nullptr;  // [m] with step 1, [1] with step 0
  int64_t x_scale_step = 1;
  const float* w_scale = nullptr;  // [n]
  const float* bias = nullptr;     // [n] or null
  void* y = nullptr;               // [m, n]
  OutType out = OutType::kBFloat16;
};

}  // namespace spense
