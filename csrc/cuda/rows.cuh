// SPDX-License-Identifier: Apache-2.0
// What the kernels that quantise rows share: element types, and launches of many rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/quantize.h"

namespace spense::cuda {
namespace {

constexpr int kMaxSmem = 220 * 1024;
constexpr uint32_t kInfinityBits = 0x7F800000u;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// Calls run.operator()<T>() with the type of the elements.
template <typename Run>
void with_type(InType type, Run run) {
  switch (type) {
    case InType::kBFloat16:
      return run.template operator()<__nv_bfloat16>();
    case InType::kFloat16:
      return run.template operator()<__half>();
    case InType::kFloat32:
      return run.template operator()<float>();
  }
}

// Calls launch(part, first row) for as many rows at a time as one grid takes.
template <typename Launch>
void for_parts(const QuantizeArgs& args, Launch launch) {
  constexpr int64_t kMaxGridRows = 65535;  // of grid.y
  for (int64_t row = 0; row < args.m; row += kMaxGridRows) {
    QuantizeArgs part = args;
    part.m = std::min(kMaxGridRows, args.m - row);
    part.x = static_cast<const char*>(args.x) + row * args.x_stride * bytes_of(args.in);
    part.y = args.y + row * args.y_stride;
    part.scale = args.scale + row;
    launch(part, row);
  }
}

}  // namespace
}  // namespace spense::cuda
