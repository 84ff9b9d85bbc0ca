// SPDX-License-Identifier: Apache-2.0
// Constants of one kernel of the family, its shared memory and its tensor memory.
#pragma once

#include <cstdint>

#include "device/job_ring.cuh"
#include "format/tile_stream.h"
#include "heuristics/sm100.h"
#include "sm100/params.h"

namespace spense::sm100 {

using format::kDenseUnitBytes;
using format::kRowBytes;
using format::kSparseUnitBytes;
using format::kTileRows;
using heuristics::sm100::Config;

// The epilogue's warps come first: warp i of four reads the tensor memory's lanes 32 i and on.
enum class WarpRole { kEpilogue, kWeights, kActivations, kMma };

// What the weight warp tells the others about a segment, through a ring in shared memory.
struct alignas(16) Job {
  int32_t row_tile, token_tile;  // the cluster's first row tile; < 0: there is no more work
  int32_t step_begin, step_end;  // steps of 256 columns
  int32_t first, last;           // clusters that share the tile
  int32_t sparse[4];             // sparse units of the row tile of each CTA, of the whole tile
  int32_t unused[2];

  __device__ __forceinline__ static Job load(uint32_t smem) {
    const int4 a = device::load_words(smem), b = device::load_words(smem + 16),
               c = device::load_words(smem + 32);
    return {a.x, a.y, a.z, a.w, b.x, b.y, {b.z, b.w, c.x, c.y}, {}};
  }
};
static_assert(sizeof(Job) == heuristics::sm100::kJobBytes);

// The units of a job in the order in which every role meets them: steps that are sparse in any of
// the CTAs, then blocks of 128 columns that are dense in any. CTAs of a pair share instructions;
// where one of them has the other kind, its rows sit out, and where both have, the pair does. Such
// columns of x pass twice.
struct Units {
  int32_t sparse_begin, sparse_end;
  int32_t dense_begin, dense_end;

  __device__ Units(const Job& job, int32_t k_blocks) {
    sparse_begin = job.step_begin;
    const int32_t most = max(max(job.sparse[0], job.sparse[1]), max(job.sparse[2], job.sparse[3]));
    const int32_t least = min(min(job.sparse[0], job.sparse[1]), min(job.sparse[2], job.sparse[3]));
    sparse_end = max(sparse_begin, min(job.step_end, most));
    dense_begin = 2 * max(job.step_begin, least);
    dense_end = min(2 * job.step_end, k_blocks);
  }
};
// One of four, without an array in local memory.
__device__ __forceinline__ int32_t pick(const int32_t (&of)[4], int i) {
  return i < 2 ? (i == 0 ? of[0] : of[1]) : (i == 2 ? of[2] : of[3]);
}
// Whether the CTA's own tile holds that unit.
__device__ __forceinline__ bool holds_sparse(const Job& job, int cta, int step) {
  return step < pick(job.sparse, cta);
}
__device__ __forceinline__ bool holds_dense(const Job& job, int cta, int block) {
  return block >= 2 * pick(job.sparse, cta);
}

template <int tokens, int ctas, int pairs, int w_stages, int x_stages, int residency>
struct Traits {
  static constexpr Config kConfig{"", tokens, ctas, pairs, w_stages, x_stages, residency};
  static_assert(heuristics::sm100::legal(kConfig));

  static constexpr int kTokens = tokens;
  static constexpr int kCtas = ctas;  // of an instruction; the first of them is their leader
  static constexpr int kPairs = pairs;
  static constexpr int kClusterSize = heuristics::sm100::cluster_ctas(kConfig);
  static constexpr int kWStages = w_stages;
  static constexpr int kXStages = x_stages;
  static constexpr int kResidency = residency;
  static constexpr int kJobStages = heuristics::sm100::kJobStages;
  static constexpr int kAccumulators = heuristics::sm100::accumulators(kConfig);
  static constexpr int kThreads = heuristics::sm100::kThreads;
  static constexpr int kChunk = tokens < 32 ? 16 : 32;  // columns that the epilogue holds at once

  // Shared memory, in bytes from the start:
  //   w ring      kWStages x 20480         units: 16 KiB values (128-byte swizzle), metadata
  //   x ring      kXStages x kXStageBytes  128 columns of the CTA's tokens (128-byte swizzle)
  //   jobs        kJobStages x 48
  //   barriers    w_full, w_empty, x_full, x_empty, sums_full, sums_empty, job_full, job_empty,
  //               drained
  //   tmem        one word, the address of the tensor memory
  //   scales      x_scale of the token tile, a copy for each warp of the epilogue
  static constexpr int kWStageBytes = heuristics::sm100::kWStageBytes;
  static constexpr int kXStageBytes = heuristics::sm100::x_stage_bytes(kConfig);
  static constexpr int kHeldTokens = heuristics::sm100::held_tokens(kConfig);
  static constexpr int kXBoxTokens = heuristics::sm100::box_tokens(kConfig);
  static constexpr int kXRing = kWStages * kWStageBytes;
  static constexpr int kJobs = kXRing + kXStages * kXStageBytes;
  static constexpr int kWFull = kJobs + kJobStages * heuristics::sm100::kJobBytes;
  static constexpr int kWEmpty = kWFull + 8 * kWStages;
  static constexpr int kXFull = kWEmpty + 8 * kWStages;
  static constexpr int kXEmpty = kXFull + 8 * kXStages;
  static constexpr int kSumsFull = kXEmpty + 8 * kXStages;
  static constexpr int kSumsEmpty = kSumsFull + 8 * kAccumulators;
  static constexpr int kJobFull = kSumsEmpty + 8 * kAccumulators;
  static constexpr int kJobEmpty = kJobFull + 8 * kJobStages;
  static constexpr int kDrained = kJobEmpty + 8 * kJobStages;
  static constexpr int kTmem = kDrained + 8;
  static constexpr int kScales = kTmem + 8;
  static constexpr int kSmemBytes = kScales + 4 * kTokens * heuristics::sm100::kEpilogueWarps;
  static_assert(kSmemBytes == heuristics::sm100::smem_bytes(kConfig));
  static_assert(kWStageBytes % 1024 == 0 && kXStageBytes % 1024 == 0, "the swizzle's period");
  static_assert(kJobs % 16 == 0 && kWFull % 8 == 0);

  // Tensor memory, in columns from the start: the accumulators, then a metadata slot for each
  // stage of w. The barrier that protects the stage protects the slot.
  static constexpr int kMetadata = kAccumulators * kTokens;
  static constexpr int kMetadataColumns = heuristics::sm100::kMetadataColumns;
  static constexpr int kTmemColumns = heuristics::sm100::tmem_columns(kConfig);
  static_assert(kMetadata % 4 == 0, "metadata begins at a multiple of four columns");
};

}  // namespace spense::sm100
