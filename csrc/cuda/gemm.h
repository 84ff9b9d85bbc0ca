// SPDX-License-Identifier: Apache-2.0
// The hybrid GEMM on the current device: plan, then run.
#pragma once

#include <optional>
#include <string>

#include "cuda/api.h"
#include "heuristics/gemm.h"

namespace spense::cuda {

//   y[m, n] = ((sum_k x[m, k] * w[n, k]) * x_scale[m]) * w_scale[n] + bias[n]
struct GemmArgs {
  int64_t m = 0, n = 0, k = 0;   // all at least 1
  const uint8_t* x = nullptr;    // [m, k] e4m3 in gather order, 16-byte aligned
  int64_t x_stride = 0;          // bytes, a multiple of 16
  const uint8_t* w = nullptr;    // tile stream, 16-byte aligned
  int64_t w_bytes = 0;
  const int32_t* tiles = nullptr;  // [tile_count(n) + 1, 4], 16-byte aligned
  const float* x_scale = nullptr;  // [m] with step 1, [1] with step 0
  int64_t x_scale_step = 1;
  const float* w_scale = nullptr;  // [n]
  const float* bias = nullptr;     // [n] or null
  void* y = nullptr;               // [m, n]
  OutType out = OutType::kBFloat16;
};

struct GemmPlan {
  const heuristics::GemmConfig* config = nullptr;
  heuristics::ScheduleParams schedule;
  int ahead = 0;              // weight units to prefetch into L2
  int64_t partial_bytes = 0;  // of `partials`
  int64_t counters = 0;       // of `counters`
};

// Names of the configs that run on this device, in a list for messages; empty for none.
SPENSE_API std::string gemm_configs(const DeviceInfo& device);

// The best config, or the one named. Nothing when no config has that name, or runs here.
SPENSE_API std::optional<GemmPlan> plan_gemm(const GemmArgs& args, bool fast_accum,
                                             const char* config);

// `partials` is uninitialised room for this launch alone; `counters` are zero before and after,
// and no other launch may use them at the same time. Launched as a programmatic dependent that
// reads w and tiles before the kernel ahead has finished: that one must not write them.
SPENSE_API void run_gemm(const GemmPlan& plan, const GemmArgs& args, void* partials,
                         uint32_t* counters, Stream stream);

}  // namespace spense::cuda
