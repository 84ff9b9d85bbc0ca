// SPDX-License-Identifier: Apache-2.0
// From a plan to one of the compiled kernels.
#include "sm100/launch.h"

#include <map>
#include <mutex>
#include <string_view>
#include <utility>

#include "device/cache_policy.h"
#include "device/instance.h"
#include "sm100/params.h"

namespace spense::sm100 {

#define INSTANCE(name, ...)                                      \
  void launch_##name(const Params& params, cuda::Stream stream); \
  int max_clusters_##name();
#include "heuristics/sm100_instances.def"
#undef INSTANCE

namespace {

constexpr cuda::Instance<Params> kInstances[] = {
#define INSTANCE(name, ...) {#name, &launch_##name, &max_clusters_##name},
#include "heuristics/sm100_instances.def"
#undef INSTANCE
};

}  // namespace

int cluster_slots(const heuristics::sm100::Config& config, int device) {
  static std::mutex guard;
  static std::map<std::pair<std::string_view, int>, int> known;
  const std::lock_guard lock(guard);
  const auto [at, fresh] = known.try_emplace({config.name, device}, 0);
  if (fresh) {
    const auto& instance = cuda::find_instance(kInstances, config.name);
    at->second = instance.max_clusters() / config.residency;
  }
  return at->second;
}

cuda::ByteMatrix x_matrix(const heuristics::sm100::Config& config, const GemmArgs& args) {
  return {args.x, args.m, args.k, args.x_stride, heuristics::sm100::box_tokens(config), true};
}

cuda::ByteMatrix w_matrix(const GemmArgs& args, int unit_bytes) {
  constexpr int64_t kRow = format::kRowBytes;
  return {args.w, args.w_bytes / kRow, kRow, kRow, unit_bytes / format::kRowBytes, false};
}

void launch(const heuristics::sm100::Config& config, const heuristics::ScheduleParams& schedule,
            const GemmArgs& args, void* partials, uint32_t* counters, cuda::Stream stream) {
  Params p = {};
  p.x_map = cuda::tensor_map(x_matrix(config, args));
  if (config.ctas > 1) {
    p.sparse_map = cuda::tensor_map(w_matrix(args, format::kSparseUnitBytes));
    p.dense_map = cuda::tensor_map(w_matrix(args, format::kDenseUnitBytes));
  }
  p.w = args.w;
  p.tiles = reinterpret_cast<const int4*>(args.tiles);
  p.x_scale = args.x_scale;
  p.w_scale = args.w_scale;
  p.bias = args.bias;
  p.y = args.y;
  p.partials = static_cast<float*>(partials);
  p.counters = counters;
  p.w_policy = device::weight_policy(schedule.token_tiles);
  p.x_scale_step = static_cast<int32_t>(args.x_scale_step);
  p.m = static_cast<int32_t>(args.m);
  p.n = static_cast<int32_t>(args.n);
  p.out = args.out;
  p.schedule = schedule;
  cuda::find_instance(kInstances, config.name).launch(p, stream);
}

}  // namespace spense::sm100
