// SPDX-License-Identifier: Apache-2.0
#include "cuda/gemm.h"

#include "sm90/launch.h"

namespace spense::cuda {

std::string gemm_configs(const DeviceInfo& device) {
#if SPENSE_BUILT_SM90
  if (device.arch == 90) return heuristics::choice_names();
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
#if SPENSE_BUILT_SM90
  const heuristics::MaxClusters& fit = sm90::max_clusters(device.index);
#else
  const heuristics::MaxClusters fit;
#endif
  const auto choice = config ? heuristics::find_choice(desc, fit, config)
                             : std::optional(heuristics::choose(desc, fit));
  if (!choice) return std::nullopt;
  GemmPlan plan;
  plan.choice = *choice;
  plan.schedule = heuristics::schedule(desc, plan.choice,
                                       heuristics::cluster_slots(desc, fit, *plan.choice.config));
  plan.partial_bytes = heuristics::partial_bytes(*plan.choice.config, plan.schedule);
  plan.counters = heuristics::counter_count(*plan.choice.config, plan.schedule);
  return plan;
}

void run_gemm(const GemmPlan& plan, const GemmArgs& args, void* partials, uint32_t* counters,
              Stream stream) {
#if SPENSE_BUILT_SM90
  sm90::launch(*plan.choice.config, plan.schedule, args, partials, counters, stream);
#else
  static_cast<void>(plan), static_cast<void>(args), static_cast<void>(partials);
  static_cast<void>(counters), static_cast<void>(stream);
#endif
}

}  // namespace spense::cuda
