// SPDX-License-Identifier: Apache-2.0
// Configs, budgets and choice of the SM100 family, as heuristics/gemm.h has them for SM90.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "heuristics/gemm.h"

namespace spense::heuristics::sm100 {

// One compiled kernel of the SM100 family. Every CTA works on one row tile of 128 rows.
struct Config {
  const char* name;
  int tokens;     // token tile, the N of the instruction
  int ctas;       // CTAs that share an instruction (cta_group), each with its own row tile
  int pairs;      // 2: two such pairs make a cluster and share their activations by multicast
  int w_stages;   // ring of weight units, 20 KiB a unit
  int x_stages;   // ring of activation blocks; each CTA holds tokens / ctas rows of 128 bytes
  int residency;  // CTAs a multiprocessor holds
};

// --- budgets ---
inline constexpr int kEpilogueWarps = 4;
inline constexpr int kThreads = (kEpilogueWarps + 3) * 32;  // and weights, activations, MMA
inline constexpr int kSmemPerMultiprocessor = 228 * 1024;
inline constexpr int kSmemReservedPerCta = 1024;
inline constexpr int kSmemPerCta = 227 * 1024;
inline constexpr int kBarrierBytes = 8;
inline constexpr int kJobStages = 4;  // segments that the weight warp may be ahead
inline constexpr int kJobBytes = 48;
inline constexpr int kMaxClusterCtas = 4;
inline constexpr int kTmemColumns = 512;       // of a multiprocessor
inline constexpr int kMetadataColumns = 8;     // of a sparse unit: 32 bytes a row
inline constexpr int kMaxDoubledTokens = 224;  // two accumulators of 256 leave no metadata columns
inline constexpr int kWStageBytes = format::kSparseUnitBytes;

constexpr int cluster_ctas(const Config& c) { return c.ctas * c.pairs; }
// Tokens of a block of x that a CTA holds, and that it fetches for all that hold the same.
constexpr int held_tokens(const Config& c) { return c.tokens / c.ctas; }
constexpr int box_tokens(const Config& c) { return held_tokens(c) / c.pairs; }
constexpr int x_stage_bytes(const Config& c) { return held_tokens(c) * format::kRowBytes; }
// Accumulators, so that one is read while the next tile is multiplied.
constexpr int accumulators(const Config& c) { return c.tokens <= kMaxDoubledTokens ? 2 : 1; }
constexpr int barriers(const Config& c) {
  return 2 * (c.w_stages + c.x_stages + accumulators(c) + kJobStages) + 1;
}
constexpr int smem_bytes(const Config& c) {
  const int words = kEpilogueWarps * c.tokens + 2;  // scales, tensor memory address, padding
  return c.w_stages * kWStageBytes + c.x_stages * x_stage_bytes(c) + kJobStages * kJobBytes +
         barriers(c) * kBarrierBytes + words * 4;
}
constexpr int smem_limit(const Config& c) {
  const int share = kSmemPerMultiprocessor / c.residency - kSmemReservedPerCta;
  return share < kSmemPerCta ? share : kSmemPerCta;
}
// Columns used: the accumulators, then one metadata slot a stage of w, which the stage's own
// barrier protects. What is allocated is the next power of two.
constexpr int tmem_used(const Config& c) {
  return accumulators(c) * c.tokens + c.w_stages * kMetadataColumns;
}
constexpr int tmem_columns(const Config& c) {
  int columns = 32;
  while (columns < tmem_used(c)) columns *= 2;
  return columns;
}

// Arrivals that complete a phase of each barrier. A commit of the tensor cores counts as one.
constexpr int w_full_arrivals() { return 1; }
constexpr int w_empty_arrivals() { return 1; }
constexpr int x_full_arrivals() { return 1; }
constexpr int x_empty_arrivals(const Config& c) { return c.pairs; }
constexpr int sums_full_arrivals() { return 1; }
constexpr int sums_empty_arrivals(const Config& c) { return kEpilogueWarps * c.ctas; }
constexpr int job_full_arrivals() { return 1; }
constexpr int job_empty_arrivals() { return kEpilogueWarps + 2; }  // and activations, MMA
constexpr int drained_arrivals() { return 1; }

constexpr bool legal(const Config& c) {
  const bool group =
      (c.ctas == 1 && c.pairs == 1) || (c.ctas == 2 && (c.pairs == 1 || c.pairs == 2));
  // N of tcgen05.mma with 128 rows a CTA; the epilogue reads 16 or 32 columns at a time.
  const bool tile = c.tokens == 16 || (c.tokens % 32 == 0 && c.tokens >= 32 && c.tokens <= 256);
  // Whole periods of the 128-byte swizzle, and what one box of a tensor copy may hold.
  const bool box = box_tokens(c) % 8 == 0 && box_tokens(c) <= 256;
  // A sparse unit needs two blocks of x, and something should be under way meanwhile.
  const bool rings = c.w_stages >= 2 && c.x_stages >= 4;
  const bool residency = c.residency == 1 || c.residency == 2;
  return group && tile && box && rings && residency && smem_bytes(c) <= smem_limit(c) &&
         tmem_columns(c) * c.residency <= kTmemColumns;
}

// --- choice ---
const std::vector<Config>& configs();
const Config* find_config(std::string_view name);
std::string config_names();

// What a multiprocessor of a B200 does, for the choice and for docs/sm100.md; published figures.
struct Machine {
  double clock_ghz = 1.85;
  double dram_bytes_per_us = 8e6;
  double l2_bytes_per_us = 12e6;  // an assumption: nobody publishes it
  double smem_bytes_per_clock = 128;
  double macs_per_clock = 8192;  // dense e4m3
  double clocks_per_store = 2;   // an assumption: of 32 neighbouring elements of a token
};

// Where the time of a launch goes, each as if the others cost nothing. A model, not a measurement.
struct Estimate {
  double tensor_us, smem_us, dram_us, l2_us;
  double total_us() const;
};
Estimate estimate(const GemmDesc& desc, const Config& config, const Machine& machine = {});

// The smallest token tile whose estimate is within 5 % of the least.
const Config& choose(const GemmDesc& desc);
// `slots` clusters of the config fit the device at a time; 0: unknown.
ScheduleParams schedule(const GemmDesc& desc, const Config& config, int slots = 0);

// Partial sums that a launch may need room for, and its counters: one a warp of the epilogue.
int64_t partial_bytes(const Config& config, const ScheduleParams& schedule);
int64_t counter_count(const Config& config, const ScheduleParams& schedule);

}  // namespace spense::heuristics::sm100
