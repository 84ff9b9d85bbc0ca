// SPDX-License-Identifier: Apache-2.0
// What stands before a GEMM, with the quantisation of quantize.h in the same pass: RMSNorm with or
// without a residual, and gated activations. float32, every step of a norm rounds on its own, and
// the row v is quantised as QuantizeArgs says, from float32.
#pragma once

#include "core/activation.h"
#include "cuda/quantize.h"

namespace spense::cuda {

// Longest row that the kernels below take.
inline constexpr int64_t kMaxFusedColumns = 131072;

//   s[i] = x[i], or x[i] + residual[i] rounded to the type of x and written to sum[i]
//   q    = sum of s[i]^2: in float32 of columns 8 j to 8 j + 7, as ((0 + 1) + (2 + 3)) +
//          ((4 + 5) + (6 + 7)); of these in float64, rounded to float32 once
//   r    = 1 / sqrt(q / k + eps)
//   v[i] = (s[i] * w[i]) * r, w = weight or 1 + weight; |v[i]| is largest where |s[i] * w[i]| is
struct NormArgs {
  QuantizeArgs rows;               // x is the input
  const void* residual = nullptr;  // [m, k] in the type of x, or null
  int64_t residual_stride = 0;     // elements
  void* sum = nullptr;             // [m, k] contiguous, 16-byte aligned, with a residual
  const void* weight = nullptr;    // [k]
  bool float_weight = false;       // weight is float32, else of the type of x
  bool unit_offset = false;
  float eps = 0.0f;
};

//   v[i] = activation(gate[i]) * up[i], formulas in core/activation.h
struct GatedArgs {
  QuantizeArgs rows;         // x is the gate
  const void* up = nullptr;  // [m, k] in the type of the gate
  int64_t up_stride = 0;     // elements
  Activation activation = Activation::kSilu;
};

// Launched as programmatic dependents that read gather and weight before the kernel ahead has
// finished (that one must not write them), and let the kernel behind them start early.
SPENSE_API void norm_quantize(const NormArgs& args, Stream stream);
SPENSE_API void gated_quantize(const GatedArgs& args, Stream stream);

}  // namespace spense::cuda
