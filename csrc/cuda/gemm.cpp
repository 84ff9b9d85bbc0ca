// SPDX-License-Identifier: Apache-2.0
#include "cuda/gemm.h"

#include <map>
#include <string>
#include <tuple>

#include "sm100/launch.h"
#include "sm90/launch.h"

namespace spense::cuda {
namespace {

heuristics::GemmDesc describe(const GemmArgs& args, bool fast_accum, const DeviceInfo& device) {
  heuristics::GemmDesc desc;
  desc.m = args.m;
  desc.n = args.n;
  desc.k = args.k;
  desc.packed_bytes = args.w_bytes;
  desc.fast_accum = fast_accum;
  desc.multiprocessors = device.multiprocessors;
  return desc;
}

#if SPENSE_BUILT_SM90
std::optional<GemmPlan> plan_sm90(const heuristics::GemmDesc& desc, int device,
                                  const char* config) {
  const heuristics::MaxClusters& fit = sm90::max_clusters(device);
  const auto choice = config ? heuristics::find_choice(desc, fit, config)
                             : std::optional(heuristics::choose(desc, fit));
  if (!choice) return std::nullopt;
  GemmPlan plan;
  plan.choice = *choice;
  plan.schedule =
      heuristics::schedule(desc, *choice, heuristics::cluster_slots(desc, fit, *choice->config));
  plan.partial_bytes = heuristics::partial_bytes(*choice->config, plan.schedule);
  plan.counters = heuristics::counter_count(*choice->config, plan.schedule);
  return plan;
}
#endif

#if SPENSE_BUILT_SM100
std::optional<GemmPlan> plan_sm100(const heuristics::GemmDesc& desc, int device,
                                   const char* config) {
  namespace h = heuristics::sm100;
  const h::Config* chosen = config ? h::find_config(config) : &h::choose(desc);
  if (!chosen) return std::nullopt;
  GemmPlan plan;
  plan.choice = chosen;
  plan.schedule = h::schedule(desc, *chosen, sm100::cluster_slots(*chosen, device));
  plan.partial_bytes = h::partial_bytes(*chosen, plan.schedule);
  plan.counters = h::counter_count(*chosen, plan.schedule);
  return plan;
}
#endif

}  // namespace

std::string gemm_configs(const DeviceInfo& device) {
#if SPENSE_BUILT_SM90
  if (device.arch == 90) return heuristics::choice_names();
#endif
#if SPENSE_BUILT_SM100
  if (device.arch == 100) return heuristics::sm100::config_names();
#endif
  static_cast<void>(device);
  return "";
}

namespace {

std::optional<GemmPlan> make_plan(const GemmArgs& args, bool fast_accum, const char* config,
                                  const DeviceInfo& device) {
  const heuristics::GemmDesc desc = describe(args, fast_accum, device);
#if SPENSE_BUILT_SM90
  if (device.arch == 90) return plan_sm90(desc, device.index, config);
#endif
#if SPENSE_BUILT_SM100
  // Its sums are float32 always.
  if (device.arch == 100) return plan_sm100(desc, device.index, config);
#endif
  static_cast<void>(desc), static_cast<void>(config);
  return std::nullopt;
}

}  // namespace

// Estimating every config takes microseconds and models ask for the same few problems again and
// again: each thread remembers its plans.
std::optional<GemmPlan> plan_gemm(const GemmArgs& args, bool fast_accum, const char* config) {
  using Key = std::tuple<int, int64_t, int64_t, int64_t, int64_t, bool, std::string>;
  constexpr size_t kMost = 4096;
  thread_local std::map<Key, GemmPlan> known;
  const DeviceInfo device = device_info();
  const Key key{device.index,        args.m, args.n, args.k, args.w_bytes, fast_accum,
                config ? config : ""};
  if (const auto found = known.find(key); found != known.end()) return found->second;
  const auto plan = make_plan(args, fast_accum, config, device);
  if (!plan) return plan;
  if (known.size() >= kMost) known.clear();
  known.emplace(key, *plan);
  return plan;
}

void run_gemm(const GemmPlan& plan, const GemmArgs& args, void* partials, uint32_t* counters,
              Stream stream) {
#if SPENSE_BUILT_SM90
  if (const auto* choice = std::get_if<heuristics::GemmChoice>(&plan.choice)) {
    return sm90::launch(*choice, plan.schedule, args, partials, counters, stream);
  }
#endif
#if SPENSE_BUILT_SM100
  if (const auto* config = std::get_if<const heuristics::sm100::Config*>(&plan.choice)) {
    return sm100::launch(**config, plan.schedule, args, partials, counters, stream);
  }
#endif
  static_cast<void>(plan), static_cast<void>(args), static_cast<void>(partials);
  static_cast<void>(counters), static_cast<void>(stream);
}

}  // namespace spense::cuda
