// SPDX-License-Identifier: Apache-2.0
#include "heuristics/gemm.h"

#include <algorithm>

#include "heuristics/cost.h"

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

std::string GemmChoice::name() const {
  return std::string(config->name) + (mode == Mode::kWhole ? ":whole" : ":stream");
}

std::vector<GemmChoice> choices() {
  std::vector<GemmChoice> all;
  for (const GemmConfig& config : configs()) {
    all.push_back({&config, Mode::kWhole});
    all.push_back({&config, Mode::kStream});
  }
  return all;
}

std::string choice_names() {
  std::string names;
  for (const GemmChoice& choice : choices()) names += (names.empty() ? "" : ", ") + choice.name();
  return names;
}

namespace {

std::optional<GemmChoice> fastest(const GemmDesc& desc, const MaxClusters& fit, auto wanted) {
  std::optional<GemmChoice> best;
  double least = 0;
  for (const GemmChoice& choice : choices()) {
    if (!wanted(choice)) continue;
    const double us = estimate_us(desc, choice, cluster_slots(desc, fit, *choice.config));
    if (!best || us < least) {
      best = choice;
      least = us;
    }
  }
  return best;
}

}  // namespace

std::optional<GemmChoice> find_choice(const GemmDesc& desc, const MaxClusters& fit,
                                      std::string_view name) {
  return fastest(desc, fit, [&](const GemmChoice& choice) {
    return name == choice.config->name || name == choice.name();
  });
}

GemmChoice choose(const GemmDesc& desc, const MaxClusters& fit) {
  return *fastest(desc, fit, [&](const GemmChoice& choice) {
    return choice.config->promote || desc.fast_accum;
  });
}

int cluster_slots(const GemmDesc& desc, const MaxClusters& fit, const GemmConfig& config) {
  const auto index = static_cast<size_t>(&config - configs().data());
  const int known = index < fit.size() ? fit[index] : 0;
  // Large clusters leave multiprocessors over in every group of them that a cluster cannot span.
  const int size = config.cluster_rows;
  const int guess = desc.multiprocessors / size * (size > 2 ? 10 : 11) / 11;
  return std::max(1, known ? known : guess);
}

int pieces_of_each(int tokens, int64_t tiles, int64_t k_blocks, int slots) {
  constexpr int kShortPiece = 16;
  if (tiles >= slots) return 0;
  // Every piece gets a step, whatever a tile's columns are.
  const int64_t steps = steps_of(static_cast<int32_t>(k_blocks));
  const int64_t pieces = std::clamp<int64_t>(steps / 2, 1, slots / tiles);
  const bool nearly_all = 10 * pieces * tiles >= 9 * slots;
  const bool short_pieces = tokens <= 64 && steps * tiles <= kShortPiece * slots;
  return nearly_all || short_pieces ? static_cast<int>(pieces) : 0;
}

ScheduleParams schedule(const GemmDesc& desc, const GemmChoice& choice, int slots) {
  constexpr int kBand = 16, kSkew = 100;
  const GemmConfig& config = *choice.config;
  ScheduleParams p;
  p.row_tiles = static_cast<int32_t>(desc.row_tiles());
  p.token_tiles = static_cast<int32_t>(format::ceil_div(desc.m, config.tokens));
  p.k_blocks = static_cast<int32_t>(desc.k_blocks());
  p.stream_blocks = static_cast<int32_t>(desc.stream_blocks());
  p.band = std::min(p.token_tiles, kBand);
  if (config.tokens > 64) {
    const int64_t blocks = desc.row_tiles() * desc.k_blocks();
    p.back = static_cast<int32_t>(1024 * (blocks - 2 * desc.sparse_units()) / blocks);
  }
  const int32_t tiles =
      static_cast<int32_t>(format::ceil_div(p.row_tiles, group_tiles(config))) * p.token_tiles;
  if (choice.mode == Mode::kWhole || !streamable(p)) {
    p.whole = tiles;
    p.clusters = std::min(slots, tiles);
    return p;
  }

  if (const int pieces = pieces_of_each(config.tokens, tiles, p.k_blocks, slots)) {
    p.pieces = pieces;
    p.clusters = pieces * tiles;
    return p;
  }
  p.clusters = slots;
  // The cheapest a tile can be, all of it sparse.
  const int32_t steps = steps_of(p.k_blocks),
                least = blocks_of_steps(steps, p.k_blocks / 2, p.k_blocks);
  p.snap = std::min(kSparseBlocks * group_tiles(config), least / 4);
  if (config.tokens > 64) {  // bound by the tensor cores: whole tiles, and stream-K for the rest
    p.whole = tiles % p.clusters == 0 ? tiles : std::max(0, tiles / p.clusters - 1) * p.clusters;
  }
  if (config.tokens <= 64) p.skew = kSkew;
  if (p.whole < tiles) {
    // Every piece holds at least one step, also after both its cuts moved.
    const int64_t stream = p.whole == 0 ? int64_t{p.stream_blocks} * p.token_tiles
                                        : int64_t{least} * (tiles - p.whole);
    const int64_t shortest = int64_t{kMaxStepBlocks} * group_tiles(config) + 2 * p.snap;
    const int64_t fair = stream * (2048 - p.skew) / 2048;  // what the last cluster gets, times all
    p.clusters = static_cast<int32_t>(std::clamp<int64_t>(fair / shortest, 1, p.clusters));
  }
  return p;
}

int w_window(const GemmChoice& choice) {
  const GemmConfig& config = *choice.config;
  if (config.tokens > 128) return 2;
  if (choice.mode == Mode::kStream) return 3;
  return std::min(config.w_stages, 6);
}

int64_t partial_bytes(const GemmConfig& config, const ScheduleParams& schedule) {
  constexpr int64_t kSlots = 2;  // of a cluster: partial_slot()
  return kSlots * schedule.clusters * config.cluster_rows * config.row_tiles * format::kTileRows *
         config.tokens * static_cast<int64_t>(sizeof(float));
}

int64_t counter_count(const GemmConfig& config, const ScheduleParams& schedule) {
  return int64_t{schedule.clusters} * config.cluster_rows * kConsumerWarpgroups + kTicketCounters;
}

}  // namespace spense::heuristics
