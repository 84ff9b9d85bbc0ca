// SPDX-License-Identifier: Apache-2.0
// From the problem to what is launched: GemmDesc -> GemmConfig + ScheduleParams. Choosing never
// launches. Plain C++; bindings/heuristics.cpp shows it to Python.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "heuristics/schedule.h"

namespace spense::heuristics {

// A hybrid GEMM as far as the choice depends on it.
struct GemmDesc {
  int64_t m = 0, n = 0, k = 0;
  int64_t packed_bytes = 0;
  bool fast_accum = true;
  int multiprocessors = 132;

  int64_t row_tiles() const { return format::tile_count(n); }
  int64_t k_blocks() const { return format::padded_k(k) / format::kDenseUnitColumns; }
  int64_t stream_blocks() const { return packed_bytes / format::kBlockBytes; }
  int64_t sparse_units() const;  // of all tiles; the rest of the columns are dense units
};

// One compiled kernel of the SM90 family.
struct GemmConfig {
  const char* name;
  int row_tiles;  // of 128 rows in a CTA: 1, shared by both consumer warpgroups, or one for each
  int tokens;     // token tile: 8, 16, 32, 64, 128, 256
  int cluster;    // CTAs of different row tiles that share their activations by multicast
  int w_stages;   // ring of weight units for each row tile, 20 KiB a unit
  int x_stages;   // ring of activation blocks, tokens * 128 bytes each
  int residency;  // CTAs a multiprocessor holds: 2 lets the next kernel fill its rings early
  bool promoted;  // sums of a unit are added in float32 (fast_accum=False)
};

// --- budgets ---
inline constexpr int kConsumerWarpgroups = 2;
inline constexpr int kSmemPerMultiprocessor = 228 * 1024;
inline constexpr int kSmemReservedPerCta = 1024;
inline constexpr int kSmemPerCta = 227 * 1024;
inline constexpr int kBarrierBytes = 8;
inline constexpr int kJobStages = 4;  // segments that the weight warp may be ahead
inline constexpr int kJobBytes = 32;
inline constexpr int kWStageBytes = format::kSparseUnitBytes;

// Two warps load, one w and one x. Alone on a multiprocessor they are part of a whole warpgroup,
// which can hand its registers to the consumers.
constexpr int threads(const GemmConfig& c) {
  return kConsumerWarpgroups * 128 + (c.residency == 1 ? 128 : 2 * 32);
}
constexpr int x_stage_bytes(const GemmConfig& c) { return c.tokens * format::kRowBytes; }
constexpr int smem_bytes(const GemmConfig& c) {
  const int w_slots = c.row_tiles * c.w_stages;
  return w_slots * kWStageBytes + c.x_stages * x_stage_bytes(c) +
         2 * (w_slots + c.x_stages + kJobStages) * kBarrierBytes + kJobStages * kJobBytes +
         kConsumerWarpgroups * 4;
}
constexpr int smem_limit(const GemmConfig& c) {
  const int share = kSmemPerMultiprocessor / c.residency - kSmemReservedPerCta;
  return share < kSmemPerCta ? share : kSmemPerCta;
}
// Arrivals that complete a phase of each barrier.
constexpr int w_full_arrivals() { return 1; }
constexpr int x_full_arrivals() { return 1; }
constexpr int w_empty_arrivals(const GemmConfig& c) {  // one a warp that reads the tile
  return kConsumerWarpgroups / c.row_tiles * 4;
}
constexpr int x_empty_arrivals(const GemmConfig& c) { return kConsumerWarpgroups * 4 * c.cluster; }
constexpr int job_full_arrivals() { return 1; }
constexpr int job_empty_arrivals() { return kConsumerWarpgroups * 4 + 1; }  // and the x warp

constexpr bool legal(const GemmConfig& c) {
  const bool tile = c.tokens == 8 || c.tokens == 16 || c.tokens == 32 || c.tokens == 64 ||
                    c.tokens == 128 || c.tokens == 256;
  // A box of x is at least 8 rows high, the period of the 128-byte swizzle.
  const bool box =
      (c.cluster == 1 || c.cluster == 2 || c.cluster == 4) && c.tokens / c.cluster >= 8;
  // A sparse unit needs two blocks of x, and something should be under way meanwhile.
  const bool rings = c.w_stages >= 2 && c.x_stages >= 4;
  const bool rows = c.row_tiles == 1 || c.row_tiles == 2;
  // Sums of a thread: they and their promoted twin must fit the registers.
  const int sums = c.row_tiles * c.tokens / 2 * (c.promoted ? 2 : 1);
  const bool residency = c.residency == 1 || c.residency == 2;
  return tile && box && rings && rows && residency && smem_bytes(c) <= smem_limit(c) &&
         sums <= (c.residency == 1 ? 128 : 32) * (c.promoted ? 2 : 1);
}

// Row tiles that a cluster works on side by side.
constexpr int group_tiles(const GemmConfig& c) { return c.row_tiles * c.cluster; }

// Every compiled config, in the order of instances.def.
const std::vector<GemmConfig>& configs();
const GemmConfig* find_config(std::string_view name);
std::string config_names();

// The best config for a problem, and the same with the schedule it runs.
const GemmConfig& choose(const GemmDesc& desc);
ScheduleParams schedule(const GemmDesc& desc, const GemmConfig& config);

// Partial sums that a launch may need room for, and its counters.
int64_t partial_bytes(const GemmConfig& config, const ScheduleParams& schedule);
int64_t counter_count(const GemmConfig& config, const ScheduleParams& schedule);

}  // namespace spense::heuristics
