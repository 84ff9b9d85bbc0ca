// SPDX-License-Identifier: Apache-2.0
// Constants of one kernel of the family, and its shared memory.
#pragma once

#include <cstdint>

#include "format/tile_stream.h"
#include "heuristics/gemm.h"
#include "sm90/params.h"

namespace spense::sm90 {

using format::kDenseUnitBytes;
using format::kDenseUnitColumns;
using format::kRowBytes;
using format::kSparseUnitBytes;
using format::kTileRows;

enum class WarpRole { kConsumer, kWeights, kActivations, kIdle };

// What the weight warp tells the others about a segment, through a ring in shared memory.
struct alignas(16) Job {
  int32_t row_tile, token_tile;  // row_tile < 0: there is no more work
  int32_t sparse, dense;         // units
  int32_t x_begin, x_end;        // blocks of 128 columns of x
  int32_t first, last;           // clusters that share the tile
};
static_assert(sizeof(Job) == heuristics::kJobBytes);

template <int tokens, int cluster, int w_stages, int x_stages, int residency, bool promoted>
struct Traits {
  static constexpr heuristics::GemmConfig kConfig{"",       tokens,    cluster, w_stages,
                                                  x_stages, residency, promoted};
  static_assert(heuristics::legal(kConfig));

  static constexpr int kTokens = tokens;
  static constexpr int kCluster = cluster;
  static constexpr int kWStages = w_stages;
  static constexpr int kXStages = x_stages;
  static constexpr int kResidency = residency;
  static constexpr bool kPromoted = promoted;

  static constexpr int kJobStages = heuristics::kJobStages;

  static constexpr int kThreads = heuristics::threads(kConfig);
  static constexpr int kConsumerThreads = heuristics::kConsumerWarpgroups * 128;
  static constexpr int kWarpgroupRows = 64;  // wgmma's M
  // Registers of a thread after the loaders' warpgroup has handed over (residency 1).
  static constexpr int kLoaderRegisters = 56, kConsumerRegisters = 224;
  static_assert(kLoaderRegisters + 2 * kConsumerRegisters <= 65536 / 128);
  static constexpr int kSums = tokens / 2;   // accumulator registers of a thread
  static_assert(kWarpgroupRows * heuristics::kConsumerWarpgroups == kTileRows);

  // Shared memory, in bytes from the start:
  //   w ring      kWStages x 20480   a unit: 16 KiB values (128-byte swizzle), 4 KiB metadata
  //   x ring      kXStages x tokens * 128   128 columns of the token tile (128-byte swizzle)
  //   barriers    w_full, w_empty, x_full, x_empty, job_full, job_empty
  //   jobs        kJobStages x 32
  //   tickets     one word a consumer warpgroup, for the fix-up
  static constexpr int kWStageBytes = heuristics::kWStageBytes;
  static constexpr int kXStageBytes = heuristics::x_stage_bytes(kConfig);
  static constexpr int kXBoxTokens = tokens / cluster;  // what each CTA of a cluster fetches
  static constexpr int kXRing = kWStages * kWStageBytes;
  static constexpr int kWFull = kXRing + kXStages * kXStageBytes;
  static constexpr int kWEmpty = kWFull + 8 * kWStages;
  static constexpr int kXFull = kWEmpty + 8 * kWStages;
  static constexpr int kXEmpty = kXFull + 8 * kXStages;
  static constexpr int kJobFull = kXEmpty + 8 * kXStages;
  static constexpr int kJobEmpty = kJobFull + 8 * kJobStages;
  static constexpr int kJobs = kJobEmpty + 8 * kJobStages;
  static constexpr int kTickets = kJobs + heuristics::kJobBytes * kJobStages;
  static_assert(kJobs % 16 == 0);
  static constexpr int kSmemBytes = kTickets + 4 * heuristics::kConsumerWarpgroups;
  static_assert(kSmemBytes == heuristics::smem_bytes(kConfig));
  static_assert(kWStageBytes % 1024 == 0 && kXStageBytes % 1024 == 0, "the swizzle's period");
};

// The tile table on the device; a warp searches it together.
struct DeviceTable {
  const int4* tiles;
  int32_t row_tiles, stream_blocks, cluster;

  __device__ int32_t blocks_before(int32_t tile) const { return __ldg(&tiles[tile].x); }
  __device__ int32_t sparse_units(int32_t tile) const { return __ldg(&tiles[tile].y); }

  // The last group g with width * blocks_before(cluster * g) <= target. First looks around the
  // place that equal tiles would give, then cuts the range into 32 parts until one group is left.
  __device__ int32_t find(int32_t groups, int32_t width, int64_t target) const {
    const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
    const auto within = [&](int32_t group) {
      return group < groups &&
             static_cast<int64_t>(width) * blocks_before(group * cluster) <= target;
    };
    const int32_t guess = static_cast<int32_t>(
        static_cast<float>(target) / (static_cast<float>(width) * stream_blocks) * groups);
    int32_t low = max(0, min(guess - 15, groups - 1));
    uint32_t hits = __ballot_sync(~0u, within(low + lane));
    if (hits != 0 && (hits != ~0u || low + 32 >= groups)) return low + __popc(hits) - 1;
    low = 0;
    int32_t high = groups;
    while (high - low > 1) {
      const int32_t stride = (high - low + 31) / 32;
      hits = __ballot_sync(~0u, low + lane * stride < high && within(low + lane * stride));
      low += (__popc(hits) - 1) * stride;
      high = min(high, low + stride);
    }
    return low;
  }
};

}  // namespace spense::sm90
