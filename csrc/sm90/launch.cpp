// SPDX-License-Identifier: Apache-2.0
// From a plan to one of the compiled kernels.
#include "sm90/launch.h"

#include <map>
#include <mutex>

#include "device/cache_policy.h"
#include "device/instance.h"
#include "sm90/params.h"

namespace spense::sm90 {

#define INSTANCE(name, ...)                                      \
  void launch_##name(const Params& params, cuda::Stream stream); \
  int max_clusters_##name();
#include "heuristics/sm90_instances.def"
#undef INSTANCE

namespace {

constexpr cuda::Instance<Params> kInstances[] = {
#define INSTANCE(name, ...) {#name, &launch_##name, &max_clusters_##name},
#include "heuristics/sm90_instances.def"
#undef INSTANCE
};

}  // namespace

const heuristics::MaxClusters& max_clusters(int device) {
  static std::mutex guard;
  static std::map<int, heuristics::MaxClusters> of_device;
  const std::lock_guard lock(guard);
  heuristics::MaxClusters& fit = of_device[device];
  if (fit.empty()) {
    for (const auto& instance : kInstances) fit.push_back(instance.max_clusters());
  }
  return fit;
}

cuda::ByteMatrix x_matrix(const heuristics::GemmConfig& config, const GemmArgs& args) {
  return {args.x, args.m, args.k, args.x_stride,
          heuristics::tile_tokens(config, args.m) / config.cluster_rows};
}

void launch(const heuristics::GemmChoice& choice, const heuristics::ScheduleParams& schedule,
            const GemmArgs& args, void* partials, uint32_t* counters, cuda::Stream stream) {
  constexpr int kWideStore = 16;
  const heuristics::GemmConfig& config = *choice.config;
  Params p = {};
  p.x_map = cuda::tensor_map(x_matrix(config, args));
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
  p.tile_tokens = heuristics::tile_tokens(config, args.m);
  p.out = args.out;
  p.wide_rows = args.n * bytes_of(args.out) % kWideStore == 0 &&
                reinterpret_cast<uintptr_t>(args.y) % kWideStore == 0;
  p.schedule = schedule;
  p.w_window = heuristics::w_window(choice);
  p.staged = heuristics::staged(config) && p.wide_rows && args.out != OutType::kFloat32;
  if (p.staged) {
    const int64_t row_bytes = args.n * bytes_of(args.out);
    p.y_map =
        cuda::tensor_map({args.y, args.m, row_bytes, row_bytes, heuristics::store_tokens(config)});
  }
  cuda::find_instance(kInstances, config.name).launch(p, stream);
}

}  // namespace spense::sm90
