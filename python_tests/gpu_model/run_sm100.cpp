// SPDX-License-Identifier: Apache-2.0
// Runs the SM100 kernels: their own source, launched by their own launch(), on model::machine().
#include "run.h"
#include "sm100/kernel.cuh"
#include "sm100/launch.cpp"

#ifndef MODEL_CONFIGS
#define MODEL_CONFIGS ""  // names of the configs to compile; all when empty
#endif

namespace spense::sm100 {
namespace {

constexpr bool compiled(std::string_view name) {
  constexpr std::string_view wanted = MODEL_CONFIGS;
  return wanted.empty() || wanted.find(name) != wanted.npos;
}
template <bool kCompiled, class T>
void launch_if(const Params& params, cuda::Stream stream) {
  if constexpr (kCompiled) {
    cuda::launch_persistent<T>(&hybrid_gemm<T>, params.schedule.clusters, stream, params);
  }
}

}  // namespace

#define INSTANCE(name, ...)                                          \
  void launch_##name(const Params& params, cuda::Stream stream) {    \
    launch_if<compiled(#name), Traits<__VA_ARGS__>>(params, stream); \
  }                                                                  \
  int max_clusters_##name() { return 0; }
#include "heuristics/sm100_instances.def"
#undef INSTANCE

}  // namespace spense::sm100

int main(int count, char** words) {
  using namespace spense;
  std::vector<model::Kernel> kernels;
  for (const auto& config : heuristics::sm100::configs()) {
    if (!sm100::compiled(config.name)) continue;
    kernels.push_back({config.name, config.tokens, heuristics::sm100::cluster_ctas(config),
                       [&config](model::Problem& problem, int multiprocessors) {
                         heuristics::GemmDesc desc;
                         const GemmArgs args = problem.args();
                         desc.m = args.m, desc.n = args.n, desc.k = args.k;
                         desc.packed_bytes = args.w_bytes;
                         desc.multiprocessors = multiprocessors;
                         const int slots =
                             multiprocessors / heuristics::sm100::cluster_ctas(config);
                         const auto schedule = heuristics::sm100::schedule(desc, config, slots);
                         model::machine().regions =
                             problem.regions(heuristics::sm100::partial_bytes(config, schedule),
                                             heuristics::sm100::counter_count(config, schedule));
                         sm100::launch(config, schedule, problem.args(), problem.partials(),
                                       problem.counters(), nullptr);
                       }});
  }
  return model::run_all(kernels, count, words);
}
