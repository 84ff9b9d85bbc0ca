// SPDX-License-Identifier: Apache-2.0
// Rows to e4m3 with one scale a row, gathering columns on the way.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace spense::cpu {

//   scale[m] = max(amax(|x[m, :]|), 1e-12) * (1 / 448)
//   y[m, p]  = e4m3(x[m, gather[p]] * (1 / scale[m])), round to nearest even, saturating
// in float32. A row with a NaN or an infinity gets scale NaN and bytes 0x7F.
// Bytes [k, y_stride) of a row are set to zero.
struct QuantizeArgs {
  int64_t m = 0, k = 0;
  const void* x = nullptr;
  InType in = InType::kBFloat16;
  int64_t x_stride = 0;             // elements
  const int32_t* gather = nullptr;  // [k], each in [0, k), or null for the identity
  uint8_t* y = nullptr;
  int64_t y_stride = 0;  // bytes, >= k
  float* scale = nullptr;
};

struct NormArgs;   // neighbours.h
struct GatedArgs;  // neighbours.h

struct QuantizeConfig {
  const char* name;
  bool (*available)();
  void (*run)(const QuantizeArgs& args, int64_t row_begin, int64_t row_end);
  void (*run_norm)(const NormArgs& args, int64_t row_begin, int64_t row_end);
  void (*run_gated)(const GatedArgs& args, int64_t row_begin, int64_t row_end);
};

extern const QuantizeConfig kQuantizeReference, kQuantizePortable;
#if defined(__x86_64__)
extern const QuantizeConfig kQuantizeAvx2, kQuantizeAvx512;
#endif

// Position of the first entry of gather outside [0, k), or -1.
int64_t first_bad_gather(const int32_t* gather, int64_t k);

}  // namespace spense::cpu
