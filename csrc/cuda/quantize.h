// SPDX-License-Identifier: Apache-2.0
// Rows to e4m3 with one scale a row, gathering columns on the way.
#pragma once

#include "cuda/api.h"

namespace spense::cuda {

//   scale[m] = max(amax(|x[m, :]|), 1e-12) * (1 / 448)
//   y[m, p]  = e4m3(x[m, gather[p]] * (1 / scale[m])), round to nearest even, saturating
// in float32. A row with a NaN or an infinity gets scale NaN and bytes 0x7F.
// Bytes [k, y_stride) of a row are set to zero. An entry of gather outside [0, k) reads column 0.
struct QuantizeArgs {
  int64_t m = 0, k = 0;
  const void* x = nullptr;
  InType in = InType::kBFloat16;
  int64_t x_stride = 0;             // elements
  const int32_t* gather = nullptr;  // [k] or null for the identity
  uint8_t* y = nullptr;             // 16-byte aligned
  int64_t y_stride = 0;             // bytes, k rounded up to 128
  float* scale = nullptr;
};

// Launched as a programmatic dependent: it may start, and read gather, while the kernel before it
// finishes, so one that writes gather must not trigger its dependents early. It lets the kernel
// behind it start early.
SPENSE_API void quantize_fp8(const QuantizeArgs& args, Stream stream);

}  // namespace spense::cuda
