// SPDX-License-Identifier: Apache-2.0
// The rings of a CTA and the warps that fill them.
//
//   barrier    one a slot of  completed by                                       waited for by
//   w_full     each w ring    the copy's bytes, after the weight warp armed it   its consumers
//   w_empty    each w ring    each consumer warp that reads the tile             weight warp
//   x_full     x ring         the bytes of all copies of the cluster             consumers
//   x_empty    x ring         each consumer warp of each CTA of the cluster      activation warp
//   job_full   jobs           the weight warp                                    all others
//   job_empty  jobs           each consumer warp and the activation warp         weight warp
//
// Fillers wait for the parity before theirs, which a fresh barrier reports as complete.
#pragma once

#include "device/cache_policy.h"
#include "device/job_ring.cuh"
#include "device/ptx.cuh"
#include "sm90/traits.cuh"

namespace spense::sm90 {

using device::Cursor;
// Hands segments from the weight warp to the other warps of the CTA.
template <class T>
using JobRing = device::JobRing<T, Job>;

__device__ __forceinline__ heuristics::Walk walk_of(const heuristics::ScheduleParams& p) {
  return heuristics::Walk{heuristics::steps_of(p.k_blocks), p.back};
}

// Fills the w rings of this CTA. It never waits for the kernel before: weights do not come from it.
// No more than w_window units of a ring are on their way at a time, so that what other CTAs and the
// activation warp ask for does not queue behind them.
template <class T>
class WeightLoader {
 public:
  __device__ WeightLoader(const Params& p, uint32_t smem) : p_(p), smem_(smem) {}

  // Publishes the segment and fetches its units, step by step through the CTA's row tiles. Missing
  // tiles of the last group repeat the last tile; their rows lie beyond n. A small tile's
  // multiplication takes little longer than this warp for a unit: steps are counted, not computed.
  __device__ void load(int row_tile, const heuristics::Segment& s, JobRing<T>& jobs) {
    const int k_blocks = p_.schedule.k_blocks;
    const heuristics::Walk walk = walk_of(p_.schedule);
    Job job{row_tile, s.token_tile, s.step_begin, s.step_end, s.first, s.last, {0, 0}};
    Tile tiles[T::kRowTiles];
#pragma unroll
    for (int t = 0; t < T::kRowTiles; ++t) {
      tiles[t] = Tile(p_.tiles, min(row_tile + t, p_.schedule.row_tiles - 1));
      job.sparse_units[t] = tiles[t].sparse_units;
    }
    jobs.put(job);
    heuristics::Turns turns(walk, s.step_begin);
#pragma unroll 1
    for (int left = s.step_end - s.step_begin; left > 0; --left) {
      const int step = turns.next();
#pragma unroll
      for (int t = 0; t < T::kRowTiles; ++t) {
        // One call, as it is much code: a CTA that starts late waits for its instructions.
        const bool sparse = step < tiles[t].sparse_units;
        const uint32_t bytes = sparse ? kSparseUnitBytes : kDenseUnitBytes;
        const uint8_t* unit = tiles[t].unit(p_.w, step);
        int units = sparse ? 1 : min(2, k_blocks - 2 * step);
#pragma unroll 1
        do {
          put(t, unit, bytes);
          unit += bytes;
        } while (--units > 0);
      }
    }
  }

 private:
  struct Tile {
    int block, sparse_units;

    Tile() = default;
    __device__ Tile(const int4* tiles, int tile) {
      const int4 entry = __ldg(&tiles[tile]);
      block = entry.x;
      sparse_units = entry.y;
    }
    __device__ const uint8_t* unit(const uint8_t* w, int step) const {
      const int at =
          heuristics::kMaxStepBlocks * step -
          (heuristics::kMaxStepBlocks - heuristics::kSparseBlocks) * min(step, sparse_units);
      return w + static_cast<int64_t>(block + at) * format::kBlockBytes;
    }
  };

  __device__ void put(int tile, const uint8_t* unit, uint32_t bytes) {
    Cursor<T::kWStages>& at = at_[tile];
    const int slot = tile * T::kWStages + at.slot;
    if (issued_++ == T::kWSlots) look_ahead(unit);
    if (p_.w_window < T::kWStages && on_the_way_[tile] == p_.w_window) {
      Cursor<T::kWStages>& landed = landed_[tile];
      ptx::barrier_wait(smem_ + T::kWFull + 8 * (tile * T::kWStages + landed.slot), landed.parity);
      landed.advance();
    } else {
      ++on_the_way_[tile];
    }
    ptx::barrier_wait(smem_ + T::kWEmpty + 8 * slot, at.parity ^ 1);
    __syncwarp();
    if (ptx::elect_one()) {
      const uint32_t full = smem_ + T::kWFull + 8 * slot;
      ptx::barrier_arrive_expect(full, bytes);
      ptx::bulk_copy(smem_ + slot * T::kWStageBytes, unit, bytes, full, p_.w_policy);
    }
    at.advance();
  }

  // With the rings full for the first time there is nothing else to do until the kernel ahead is
  // done: brings some more into L2.
  __device__ void look_ahead(const uint8_t* unit) const {
    constexpr int kPiece = 16 * 1024;
    const uint8_t* end = p_.w + int64_t{p_.schedule.stream_blocks} * format::kBlockBytes;
    if (!ptx::elect_one()) return;
    for (int i = 0; i < heuristics::kAheadBytes && unit + i + kPiece <= end; i += kPiece) {
      ptx::bulk_prefetch_l2(unit + i, kPiece);
    }
  }

  const Params& p_;
  uint32_t smem_;
  Cursor<T::kWStages> at_[T::kRowTiles];
  Cursor<T::kWStages> landed_[T::kRowTiles];  // the next unit to wait for
  int on_the_way_[T::kRowTiles] = {};         // units asked for and not waited for
  int issued_ = 0;                            // units of all rings
};

// Fetches this CTA's share of each block of x and hands it to the whole cluster.
template <class T>
class ActivationLoader {
 public:
  // row: of this CTA in the cluster.
  __device__ ActivationLoader(const Params& p, uint32_t smem, uint32_t row)
      : p_(p), smem_(smem), row_(row) {}

  __device__ void load(const Job& job) {
    const int row = job.token_tile * p_.tile_tokens + static_cast<int>(row_ * box_tokens());
    const int k_blocks = p_.schedule.k_blocks;
    heuristics::Turns turns(walk_of(p_.schedule), job.begin);
#pragma unroll 1
    for (int left = job.end - job.begin; left > 0; --left) {
      const int block = 2 * turns.next(), blocks = min(2, k_blocks - block);
      if constexpr (T::kXBlocks == 2) {
        put(block, row, blocks);
      } else {
#pragma unroll 1
        for (int i = 0; i < blocks; ++i) put(block + i, row, 1);
      }
    }
  }

 private:
  __device__ void put(int block, int row, int blocks) {
    ptx::barrier_wait(smem_ + T::kXEmpty + 8 * at_.slot, at_.parity ^ 1);
    __syncwarp();
    if (ptx::elect_one()) {
      const uint32_t full = smem_ + T::kXFull + 8 * at_.slot;
      const uint32_t slot = smem_ + T::kXRing + at_.slot * T::kXStageBytes;
      ptx::barrier_arrive_expect(full, blocks * p_.tile_tokens * kRowBytes);
#pragma unroll
      for (int i = 0; i < T::kXBlocks; ++i) {
        if (i == blocks) break;
        const uint32_t to = slot + i * T::kXBlockBytes;
        const int column = (block + i) * kRowBytes;
        if constexpr (T::kClusterSize > 1) {
          constexpr uint16_t kSharers = (1u << T::kClusterSize) - 1;
          ptx::tensor_copy_2d_multicast(to + row_ * box_tokens() * kRowBytes, &p_.x_map, column,
                                        row, full, kSharers, device::kEvictLast);
        } else {
          ptx::tensor_copy_2d(to, &p_.x_map, column, row, full, device::kEvictLast);
        }
      }
    }
    at_.advance();
  }

  __device__ uint32_t box_tokens() const { return p_.tile_tokens / T::kClusterSize; }

  const Params& p_;
  uint32_t smem_, row_;
  Cursor<T::kXStages> at_;
};

}  // namespace spense::sm90
