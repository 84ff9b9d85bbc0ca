// SPDX-License-Identifier: Apache-2.0
// Constants of one kernel of the family, and its shared memory.
#pragma once

#include <cstdint>

#include "device/job_ring.cuh"
#include "device/sharing.h"
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
  int32_t row_tile, token_tile;  // the CTA's first row tile; < 0: there is no more work
  int32_t begin, end;            // turns of the walk through K
  int32_t first, last;           // clusters that share the tile
  int32_t sparse_units[2];       // of each row tile; its other columns are dense units

  __device__ __forceinline__ static Job load(uint32_t smem) {
    const int4 a = device::load_words(smem), b = device::load_words(smem + 16);
    return {a.x, a.y, a.z, a.w, b.x, b.y, {b.z, b.w}};
  }
};
static_assert(sizeof(Job) == heuristics::kJobBytes);

template <int row_tiles, int tokens, int cluster_rows, int w_stages, int x_stages, int x_blocks,
          bool promote>
struct Traits {
  static constexpr heuristics::GemmConfig kConfig{"",       row_tiles, tokens,   cluster_rows,
                                                  w_stages, x_stages,  x_blocks, promote};
  static_assert(heuristics::legal(kConfig));

  static constexpr int kRowTiles = row_tiles;
  static constexpr int kTokens = tokens;
  static constexpr int kClusterSize = cluster_rows;  // CTAs, which share x
  static constexpr int kWStages = w_stages;
  static constexpr int kXStages = x_stages;
  static constexpr int kXBlocks = x_blocks;  // of 128 columns in a slot of x
  static constexpr bool kPromote = promote;

  static constexpr int kJobStages = heuristics::kJobStages;

  static constexpr int kThreads = heuristics::kThreads;
  static constexpr int kConsumerThreads = heuristics::kConsumerWarpgroups * 128;
  static constexpr int kPartRows = 64;  // wgmma's M
  // Parts of 64 rows that a consumer warpgroup multiplies, and of the tile that it works on.
  static constexpr int kParts = row_tiles;
  // Registers of a thread after the loaders' warpgroup has handed over. Small tiles leave half of
  // them to the small kernels around them, which then start beside this one, not behind it.
  static constexpr bool kShares = tokens <= 64;
  static constexpr int kLoaderRegisters = kShares ? 48 : 56;
  static constexpr int kConsumerRegisters = kShares ? 96 : 224;
  static_assert(kLoaderRegisters + 2 * kConsumerRegisters <=
                device::kRegisters / 128 / (kShares ? 2 : 1));
  static_assert(!kShares || kThreads == device::kSharingThreads);
  static constexpr int kSums = tokens / 2;  // accumulator registers of a thread and part
  static_assert(kPartRows * heuristics::kConsumerWarpgroups == kTileRows);

  // Shared memory, in bytes from the start:
  //   w rings     kRowTiles x kWStages x 20480   units: 16 KiB values (128-byte swizzle), metadata
  //   x ring      kXStages x kXBlocks x tokens * 128   blocks of 128 columns (128-byte swizzle)
  //   barriers    w_full, w_empty, x_full, x_empty, job_full, job_empty
  //   jobs        kJobStages x 32
  //   tickets     one word a consumer warpgroup, for the fix-up
  static constexpr int kWStageBytes = heuristics::kWStageBytes;
  static constexpr int kXStageBytes = heuristics::x_stage_bytes(kConfig);
  static constexpr int kXBlockBytes = kXStageBytes / kXBlocks;
  static constexpr int kWSlots = kRowTiles * kWStages;
  static constexpr int kXRing = kWSlots * kWStageBytes;
  static constexpr bool kStaged = heuristics::staged(kConfig);
  static constexpr int kStoreTokens = heuristics::store_tokens(kConfig);
  static constexpr bool kStagedInSlot = heuristics::staged_in_slot(kConfig);
  static constexpr int kPieces = kStagedInSlot ? heuristics::slot_pieces(kConfig) : 2;
  static constexpr int kStagingBytes =  // of a consumer warpgroup
      kStagedInSlot ? kXStageBytes / heuristics::kConsumerWarpgroups
                    : kPieces * heuristics::kStagedBytes;
  static constexpr int kStaging = kXRing + kXStages * kXStageBytes;
  static constexpr int kWFull = kStaging + heuristics::staging_bytes(kConfig);
  static constexpr int kWEmpty = kWFull + 8 * kWSlots;
  static constexpr int kXFull = kWEmpty + 8 * kWSlots;
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

}  // namespace spense::sm90
