// SPDX-License-Identifier: Apache-2.0
#include "heuristics/sm100.h"

#include <algorithm>

namespace spense::heuristics::sm100 {
namespace {

constexpr Config kConfigs[] = {
#define INSTANCE(name, ...) Config{#name, __VA_ARGS__},
#include "heuristics/sm100_instances.def"
#undef INSTANCE
};

#define INSTANCE(name, ...) static_assert(legal(Config{#name, __VA_ARGS__}), #name);
#include "heuristics/sm100_instances.def"
#undef INSTANCE

}  // namespace

const std::vector<Config>& configs() {
  static const std::vector<Config> all(std::begin(kConfigs), std::end(kConfigs));
  return all;
}

const Config* find_config(std::string_view name) {
  for (const Config& config : configs()) {
    if (config.name == name) return &config;
  }
  return nullptr;
}

std::string config_names() {
  std::string names;
  for (const Config& config : configs()) {
    names += (names.empty() ? "" : ", ") + std::string(config.name);
  }
  return names;
}

double Estimate::total_us() const { return std::max({tensor_us, smem_us, dram_us, l2_us}); }

// Every unit is four instructions of 128 rows a CTA, sparse or dense, of tokens / 2 clocks each.
// The tensor cores read both operands from shared memory for every instruction; of x, each CTA of
// a pair holds and reads its half.
Estimate estimate(const GemmDesc& desc, const Config& config, const Machine& machine) {
  const double token_tiles = static_cast<double>(format::ceil_div(desc.m, config.tokens));
  const double sparse = static_cast<double>(desc.sparse_units()),
               dense = static_cast<double>(desc.row_tiles() * desc.k_blocks()) - 2 * sparse;
  const double instruction_macs = 128.0 * config.tokens * 32;
  double clocks = (sparse + dense) * 4 * instruction_macs / machine.macs_per_clock;
  if (accumulators(config) == 1) {  // nothing is multiplied while a tile is stored
    clocks += static_cast<double>(desc.row_tiles()) * config.tokens * kEpilogueWarps *
              machine.clocks_per_store;
  }
  const double x_block = x_stage_bytes(config);
  const double smem = sparse * (format::kSparseUnitBytes + 2 * x_block) +
                      dense * (format::kDenseUnitBytes + x_block);
  // Every unit comes with its blocks of x, from L2. Weights come from memory once a band.
  const double l2 =
      static_cast<double>(desc.packed_bytes) + (2 * sparse + dense) * x_block / config.pairs;
  // Where tiles are cut, about every CTA writes and reads one part of a tile.
  const ScheduleParams cut = schedule(desc, config);
  const int64_t groups = format::ceil_div(desc.row_tiles(), cluster_ctas(config));
  const bool whole = cut.pieces == 1 || cut.whole == groups * cut.token_tiles;
  const double parts = whole ? 0 : static_cast<double>(partial_bytes(config, cut));
  const double per_us = desc.multiprocessors * machine.clock_ghz * 1e3;
  Estimate e;
  e.tensor_us = token_tiles * clocks / per_us;
  e.smem_us = token_tiles * smem / machine.smem_bytes_per_clock / per_us;
  e.l2_us = (token_tiles * l2 + parts) / machine.l2_bytes_per_us;
  e.dram_us = (static_cast<double>(desc.packed_bytes) + static_cast<double>(desc.m * desc.k) +
               2.0 * static_cast<double>(desc.m * desc.n)) /
              machine.dram_bytes_per_us;
  return e;
}

const Config& choose(const GemmDesc& desc) {
  constexpr double kAsGood = 1.05;
  double us[std::size(kConfigs)];
  for (size_t i = 0; i < std::size(kConfigs); ++i) us[i] = estimate(desc, kConfigs[i]).total_us();
  const double least = *std::min_element(std::begin(us), std::end(us));
  const Config* best = nullptr;
  for (size_t i = 0; i < std::size(kConfigs); ++i) {
    if (us[i] > kAsGood * least) continue;
    if (!best || kConfigs[i].tokens < best->tokens) best = &kConfigs[i];
  }
  return *best;
}

ScheduleParams schedule(const GemmDesc& desc, const Config& config, int slots) {
  constexpr int kBand = 16;
  ScheduleParams p;
  p.row_tiles = static_cast<int32_t>(desc.row_tiles());
  p.token_tiles = static_cast<int32_t>(format::ceil_div(desc.m, config.tokens));
  p.k_blocks = static_cast<int32_t>(desc.k_blocks());
  p.stream_blocks = static_cast<int32_t>(desc.stream_blocks());
  p.band = std::min(p.token_tiles, kBand);
  // Large clusters leave multiprocessors over in every group of them that a cluster cannot span.
  const int size = cluster_ctas(config);
  const int guess = desc.multiprocessors / size * (size > 2 ? 10 : 11) / 11;
  p.clusters = std::max(1, slots ? slots : guess);
  const int32_t tiles =
      static_cast<int32_t>(format::ceil_div(p.row_tiles, cluster_ctas(config))) * p.token_tiles;
  if (const int pieces = pieces_of_each(config.tokens, tiles, p.k_blocks, p.clusters)) {
    p.pieces = pieces;
    p.clusters = pieces * tiles;
    return p;
  }

  // The cheapest a tile can be, all of it sparse.
  const int32_t steps = steps_of(p.k_blocks),
                least = blocks_of_steps(steps, p.k_blocks / 2, p.k_blocks);
  p.snap = std::min(kSparseBlocks * cluster_ctas(config), least / 4);
  if (config.tokens > 64) {  // bound by the tensor cores: whole tiles, and stream-K for the rest
    p.whole = tiles % p.clusters == 0 ? tiles : std::max(0, tiles / p.clusters - 1) * p.clusters;
  }
  if (!streamable(p)) p.whole = tiles;
  if (p.whole < tiles) {
    // Every piece holds at least one step, also after both its cuts moved.
    const int64_t stream = p.whole == 0 ? int64_t{p.stream_blocks} * p.token_tiles
                                        : int64_t{least} * (tiles - p.whole);
    const int64_t shortest = int64_t{kMaxStepBlocks} * cluster_ctas(config) + 2 * p.snap;
    p.clusters = static_cast<int32_t>(std::clamp<int64_t>(stream / shortest, 1, p.clusters));
  }
  return p;
}

int64_t partial_bytes(const Config& config, const ScheduleParams& schedule) {
  constexpr int64_t kSlots = 2;  // of a cluster: partial_slot()
  return kSlots * schedule.clusters * cluster_ctas(config) * format::kTileRows * config.tokens *
         static_cast<int64_t>(sizeof(float));
}

int64_t counter_count(const Config& config, const ScheduleParams& schedule) {
  return int64_t{schedule.clusters} * cluster_ctas(config) * kEpilogueWarps;
}

}  // namespace spense::heuristics::sm100
