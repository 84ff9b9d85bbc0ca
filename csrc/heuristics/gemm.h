// SPDX-License-Identifier: Apache-2.0
// From the problem to what is launched: GemmDesc -> GemmChoice -> ScheduleParams. Choosing never
// launches. Plain C++.
#pragma once

#include <algorithm>
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
  int row_tiles;     // of 128 rows in a CTA: 1, shared by both consumer warpgroups, or one for each
  int tokens;        // token tile, a multiple of 8 up to 256
  int cluster_rows;  // CTAs of different row tiles that share their activations by multicast
  int w_stages;      // ring of weight units for each row tile, 20 KiB a unit
  int x_stages;      // ring of activations,
  int x_blocks;      // in slots of so many blocks, 1 or 2, of tokens * 128 bytes each
  bool promote;      // the tensor cores' sums are added in float32 every 128 columns
};

// --- budgets ---
inline constexpr int kConsumerWarpgroups = 2;
inline constexpr int kSmemPerCta = 227 * 1024;
inline constexpr int kBarrierBytes = 8;
inline constexpr int kJobStages = 4;  // segments that the weight warp may be ahead
inline constexpr int kJobBytes = 32;
inline constexpr int kWStageBytes = format::kSparseUnitBytes;

// The consumers, and a warpgroup of which two warps load; it hands its registers to the consumers.
inline constexpr int kThreads = (kConsumerWarpgroups + 1) * 128;
constexpr int x_stage_bytes(const GemmConfig& c) {
  return c.x_blocks * c.tokens * format::kRowBytes;
}
// Finished 16-bit tiles leave through shared memory, two pieces a consumer warpgroup on their way.
inline constexpr int kStagedTokens = 32;
constexpr bool staged(const GemmConfig& c) { return c.tokens >= 48; }
// Where a slot of x has room for that, it is the one with the tile's last columns.
inline constexpr int kStagedBytes = kStagedTokens * format::kRowBytes;  // of a piece
constexpr int slot_pieces(const GemmConfig& c) {
  return x_stage_bytes(c) / kConsumerWarpgroups / kStagedBytes;
}
constexpr bool staged_in_slot(const GemmConfig& c) {
  return staged(c) && !c.promote && slot_pieces(c) >= 2;
}
constexpr int staging_bytes(const GemmConfig& c) {
  return staged(c) && !staged_in_slot(c) ? kConsumerWarpgroups * 2 * kStagedBytes : 0;
}
// Tokens of one tensor store.
constexpr int store_tokens(const GemmConfig& c) {
  return c.tokens % 32 == 0 ? 32 : c.tokens % 16 == 0 ? 16 : 8;
}
// Tokens of each of a product's tiles, of which the last may hold fewer: no more than they need, as
// rows of zeros take longer to copy than rows of x. A multiple of what each CTA of a cluster copies
// and of what a store writes, unless there is but one.
constexpr int tile_tokens(const GemmConfig& c, int64_t m) {
  const int64_t tiles = format::ceil_div(m, c.tokens);
  if (tiles == 1 && c.cluster_rows == 1) return static_cast<int>(m);
  const int unit = std::max(8 * c.cluster_rows, store_tokens(c));
  return static_cast<int>(format::ceil_div(format::ceil_div(m, tiles), unit) * unit);
}
constexpr int smem_bytes(const GemmConfig& c) {
  const int w_slots = c.row_tiles * c.w_stages;
  return w_slots * kWStageBytes + c.x_stages * x_stage_bytes(c) +
         2 * (w_slots + c.x_stages + kJobStages) * kBarrierBytes + kJobStages * kJobBytes +
         kConsumerWarpgroups * 4 + staging_bytes(c);
}
// Arrivals that complete a phase of each barrier.
constexpr int w_full_arrivals() { return 1; }
constexpr int x_full_arrivals() { return 1; }
constexpr int w_empty_arrivals(const GemmConfig& c) {  // one a warp that reads the tile
  return kConsumerWarpgroups / c.row_tiles * 4;
}
constexpr int x_empty_arrivals(const GemmConfig& c) {
  return kConsumerWarpgroups * 4 * c.cluster_rows;
}
constexpr int job_full_arrivals() { return 1; }
constexpr int job_empty_arrivals() { return kConsumerWarpgroups * 4 + 1; }  // and the x warp

constexpr bool legal(const GemmConfig& c) {
  const bool tile = c.tokens % 8 == 0 && c.tokens >= 8 && c.tokens <= 256;
  // A box of x is at least 8 rows high, the period of the 128-byte swizzle.
  const bool box =
      c.cluster_rows >= 1 && c.cluster_rows <= 8 && c.tokens % (8 * c.cluster_rows) == 0;
  // A sparse unit needs two blocks of x, and something should be under way meanwhile.
  const bool blocks = c.x_blocks == 1 || c.x_blocks == 2;
  const bool rings = blocks && c.w_stages >= 2 && c.x_stages * c.x_blocks >= 4;
  const bool rows = c.row_tiles == 1 || c.row_tiles == 2;
  // Sums of a thread: they and their promoted twin must fit the registers.
  const int sums = c.row_tiles * c.tokens / 2 * (c.promote ? 2 : 1);
  return tile && box && rings && rows && smem_bytes(c) <= kSmemPerCta && sums <= 192;
}

// Row tiles that a cluster works on side by side.
constexpr int group_tiles(const GemmConfig& c) { return c.row_tiles * c.cluster_rows; }

// How tiles are dealt out.
enum class Mode {
  kWhole,   // every tile to one cluster
  kStream,  // cut along K into equal pieces, as far as that pays (schedule.h)
};

// What is launched. `name` is of the config and, behind a colon, of the mode.
struct GemmChoice {
  const GemmConfig* config = nullptr;
  Mode mode = Mode::kWhole;

  std::string name() const;
};

// Every compiled config, in the order of instances.def, and every choice there is.
const std::vector<GemmConfig>& configs();
std::vector<GemmChoice> choices();
std::string choice_names();

// Clusters of each config that the device holds at a time, in the order of configs(); 0: unknown.
using MaxClusters = std::vector<int>;

// The choice with this name; a config's name alone takes its faster mode. Nothing: no such name.
std::optional<GemmChoice> find_choice(const GemmDesc& desc, const MaxClusters& fit,
                                      std::string_view name);
// The fastest by estimate (cost.h).
GemmChoice choose(const GemmDesc& desc, const MaxClusters& fit);

// Clusters that may be under way at a time.
int cluster_slots(const GemmDesc& desc, const MaxClusters& fit, const GemmConfig& config);
// Pieces that each of fewer tiles than slots is cut into by itself, so that no cluster has to do
// with two tiles; 0 where that would leave too many clusters idle. `tokens`: of a tile.
int pieces_of_each(int tokens, int64_t tiles, int64_t k_blocks, int slots);
ScheduleParams schedule(const GemmDesc& desc, const GemmChoice& choice, int slots);

// Weight units of a ring that may be on their way at a time: enough to keep DRAM busy, not so many
// that they queue up in front of what late CTAs and the activation warps ask for.
int w_window(const GemmChoice& choice);

// What a CTA brings into L2 with its ring full.
inline constexpr int kAheadBytes = 64 * 1024;

// Room that a launch needs for sums that are put together, and its counters.
int64_t partial_bytes(const GemmConfig& config, const ScheduleParams& schedule);
// Behind a counter for each consumer warpgroup one gives out whole tiles (by_tickets).
inline constexpr int kTicketCounters = 1;
int64_t counter_count(const GemmConfig& config, const ScheduleParams& schedule);

}  // namespace spense::heuristics
