// SPDX-License-Identifier: Apache-2.0
// The hybrid GEMM on the current device: plan, then run.
#pragma once

#include <optional>
#include <string>
#include <variant>

#include "core/gemm_args.h"
#include "cuda/api.h"
#include "heuristics/gemm.h"
#include "heuristics/sm100.h"

namespace spense::cuda {

using spense::GemmArgs;

struct GemmPlan {
  // Of the family that the device runs: SM90 or SM100.
  std::variant<heuristics::GemmChoice, const heuristics::sm100::Config*> choice;
  heuristics::ScheduleParams schedule;
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
