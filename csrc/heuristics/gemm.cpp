// SPDX-License-Identifier: Apache-2.0
#include "heuristics/gemm.h"

#include <algorithm>

namespace spense::heuristics {
namespace {

constexpr GemmConfig kConfigs[] = {
#define INSTANCE(name, ...) GemmConfig{#name, __VA_ARGS__},
#include "heuristics/sm90_instances.def"
#undef INSTANCE
};

#define INSTANCE(name, ...) static_assert(legal(GemmConfig{#name, __VA_ARGS__}), #name);
#include "heuristics/sm90_instances.def"
#undef INSTANCE

}  // namespace

int64_t GemmDesc::sparse_units() const {
  // 5 s + 4 d = stream blocks and 2 s + d = blocks of 128 columns in all tiles.
  return (kDenseBlocks * row_tiles() * k_blocks() - stream_blocks()) /
         (2 * kDenseBlocks - kSparseBlocks);
}

const std::vector<GemmConfig>& configs() {
  static const std::vector<GemmConfig> all(std::begin(kConfigs), std::end(kConfigs));
  return all;
}

const GemmConfig* find_config(std::string_view name) {
  for (const GemmConfig& config : configs()) {
    if (config.name == name) return &config;
  }
  return nullptr;
}

std::string config_names() {
  std::string names;
  for (const GemmConfig& config : configs()) {
    names += (names.empty() ? "" : ", ") + std::string(config.name);
  }
  return names;
}

const GemmConfig& choose(const GemmDesc& desc) {
  const auto pick = [&](std::string_view fast, std::string_view promoted) -> const GemmConfig& {
    return *find_config(desc.fast_accum ? fast : promoted);
  };
  if (desc.m <= 8) return pick("t128x8_c1_s4x28_o2", "t128x16_c1_s4x15_o2_p");
  if (desc.m <= 16) return pick("t128x16_c1_s8x28_o1", "t128x16_c1_s4x15_o2_p");
  if (desc.m <= 32) return pick("t128x32_c1_s7x18_o1", "t128x64_c1_s6x12_o1_p");
  if (desc.m <= 64) return pick("t128x64_c1_s6x12_o1", "t128x64_c1_s6x12_o1_p");
  if (desc.m <= 128) return pick("t128x128_c1_s5x7_o1", "t128x128_c1_s5x7_o1_p");
  return pick("t128x256_c2_s3x5_o1", "t128x128_c1_s5x7_o1_p");
}

ScheduleParams schedule(const GemmDesc& desc, const GemmConfig& config) {
  constexpr int kBand = 16;
  ScheduleParams p;
  p.row_tiles = static_cast<int32_t>(desc.row_tiles());
  p.token_tiles = static_cast<int32_t>(format::ceil_div(desc.m, config.tokens));
  p.k_blocks = static_cast<int32_t>(desc.k_blocks());
  p.stream_blocks = static_cast<int32_t>(desc.stream_blocks());
  p.band = std::min(p.token_tiles, kBand);
  p.clusters = std::max(1, desc.multiprocessors / config.cluster);

  // The cheapest a tile can be, all of it sparse.
  const int32_t steps = steps_of(p.k_blocks),
                least = blocks_of_steps(steps, p.k_blocks / 2, p.k_blocks);
  p.snap = std::min(kSparseBlocks * group_tiles(config), least / 4);
  const int32_t tiles =
      static_cast<int32_t>(format::ceil_div(p.row_tiles, group_tiles(config))) * p.token_tiles;
  if (config.tokens > 64) {  // bound by the tensor cores: whole tiles, and stream-K for the rest
    p.whole = tiles % p.clusters == 0 ? tiles : std::max(0, tiles / p.clusters - 1) * p.clusters;
  }
  if (p.whole < tiles) {
    // Every piece holds at least one step, also after both its cuts moved.
    const int64_t stream = p.whole == 0 ? int64_t{p.stream_blocks} * p.token_tiles
                                        : int64_t{least} * (tiles - p.whole);
    const int64_t shortest = int64_t{kMaxStepBlocks} * group_tiles(config) + 2 * p.snap;
    p.clusters = static_cast<int32_t>(std::clamp<int64_t>(stream / shortest, 1, p.clusters));
  }
  return p;
}

int64_t partial_bytes(const GemmConfig& config, const ScheduleParams& schedule) {
  constexpr int64_t kSlots = 2;  // of a cluster: partial_slot()
  return kSlots * schedule.clusters * group_tiles(config) * format::kTileRows * config.tokens *
         static_cast<int64_t>(sizeof(float));
}

int64_t counter_count(const GemmConfig& config, const ScheduleParams& schedule) {
  return int64_t{schedule.clusters} * config.cluster * kConsumerWarpgroups;
}

}  // namespace spense::heuristics
