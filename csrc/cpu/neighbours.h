// SPDX-License-Identifier: Apache-2.0
// What stands before a GEMM, with the quantisation of quantize.h in the same pass: RMSNorm with or
// without a residual, and gated activations. All arithmetic is float32 unless a step says
// otherwise, every step rounds on its own, and the row v is quantised as QuantizeArgs says, from
// float32.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "cpu/quantize.h"

namespace spense::cpu {

//   s[i] = x[i], or x[i] + residual[i] rounded to the type of x and written to sum[i]
//   q    = sum of s[i]^2: in float32 of columns 8 j to 8 j + 7, as ((0 + 1) + (2 + 3)) +
//          ((4 + 5) + (6 + 7)); of these in float64, rounded to float32 once
//   r    = 1 / sqrt(q / k + eps)
//   v[i] = (s[i] * weight[i]) * r
struct NormArgs {
  QuantizeArgs rows;               // x is the input
  const void* residual = nullptr;  // [m, k] in the type of x, or null
  int64_t residual_stride = 0;     // elements
  void* sum = nullptr;             // [m, k] contiguous, with a residual
  const float* weight = nullptr;   // [k]
  float eps = 0.0f;
};

//   v[i] = activation(gate[i]) * up[i], formulas in core/activation.h
struct GatedArgs {
  QuantizeArgs rows;         // x is the gate
  const void* up = nullptr;  // [m, k] in the type of the gate
  int64_t up_stride = 0;     // elements
  Activation activation = Activation::kSilu;
};

}  // namespace spense::cpu
