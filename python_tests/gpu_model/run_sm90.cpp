// SPDX-License-Identifier: Apache-2.0
// Runs the SM90 kernels: their own source, launched by their own launch(), on model::machine().
// These kernels have run on the hardware with the same bits, which is what speaks for the model.
#define SPENSE_EXTENDED_TILES 1
#include "run.h"
#include "sm90/kernel.cuh"
#include "sm90/launch.cpp"

#ifndef MODEL_CONFIGS
#define MODEL_CONFIGS ""  // names of the configs to compile; all when empty
#endif

namespace spense::sm90 {
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
#include "heuristics/sm90_instances.def"
#undef INSTANCE

}  // namespace spense::sm90

int main(int count, char** words) {
  using namespace spense;
  std::vector<model::Kernel> kernels;
  for (const heuristics::GemmChoice& choice : heuristics::choices()) {
    const heuristics::GemmConfig& config = *choice.config;
    if (!sm90::compiled(config.name)) continue;
    const auto launch = [choice](model::Problem& problem, int multiprocessors) {
      const heuristics::GemmConfig& config = *choice.config;
      heuristics::GemmDesc desc;
      const GemmArgs shape = problem.args();
      desc.m = shape.m, desc.n = shape.n, desc.k = shape.k;
      desc.packed_bytes = shape.w_bytes;
      desc.multiprocessors = multiprocessors;
      const int slots = std::max(1, multiprocessors / config.cluster_rows);
      const auto schedule = heuristics::schedule(desc, choice, slots);
      model::machine().regions = problem.regions(heuristics::partial_bytes(config, schedule),
                                                 heuristics::counter_count(config, schedule));
      GemmArgs args = problem.args();
      sm90::launch(choice, schedule, args, problem.partials(), problem.counters(), nullptr);
    };
    kernels.push_back({choice.name(), config.tokens, config.cluster_rows, launch});
  }
  return model::run_all(kernels, count, words);
}
