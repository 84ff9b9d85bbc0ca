// SPDX-License-Identifier: Apache-2.0
#include "cuda/gemm.h"

#include "sm90/launch.h"

namespace spense::cuda {

std::string gemm_configs(const DeviceInfo& device) {
#if SPENSE_BUILT_SM90
  if (device.arch == 90) return heuristics::config_names();
#endif
  static_cast<void>(device);
  return "";
}

std::optional<GemmPlan> plan_gemm(const GemmArgs& args, bool fast_accum, const char* config) {
  const DeviceInfo device = device_info();
  if (gemm_configs(device).empty()) return std::nullopt;
  heuristics::GemmDesc desc;
  desc.m = args.m;
  desc.n = args.n;
  desc.k = args.k;
  desc.packed_bytes = args.w_bytes;
  desc.fast_accum = fast_accum;
  desc.multiprocessors = device.multiprocessors;
  GemmPlan plan;
  plan.config = config ? heuristics::find_config(config) : &heuristics::choose(desc);
  if (!plan.config) return std::nullopt;
  plan.schedule = heuristics::schedule(desc, *plan.config);
  plan.partial_bytes = heuristics::partial_bytes(*plan.config, plan.schedule);
  plan.counters = heuristics::counter_count(*plan.config, plan.schedule);
  return plan;
}

void run_gemm(const GemmPlan& plan, const GemmArgs& args, void* partials, uint32_t* counters,
              Stream stream) {
#if SPENSE_BUILT_SM90
  sm90::launch(*plan.config, plan.schedule, args, partials, counters, stream);
#else
  static_cast<void>(plan), static_cast<void>(args), static_cast<void>(partials);
  static_cast<void>(counters), static_cast<void>(stream);
#endif
}

}  // namespace spense::cuda
