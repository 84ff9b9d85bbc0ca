// SPDX-License-Identifier: Apache-2.0
// The rings of a CTA and the warps that fill them.
//
//   barrier     one a slot of  completed by                                    waited for by
//   w_full      w ring         the bytes of the pair, after the leader armed   MMA warp
//   w_empty     w ring         a commit of the MMA warp                        weight warp
//   x_full      x ring         the bytes of the pair, after the leader armed   MMA warp
//   x_empty     x ring         a commit of the MMA warp of each pair           activation warp
//   sums_full   accumulators   a commit of the MMA warp                        epilogue warps
//   sums_empty  accumulators   each epilogue warp of the pair                  MMA warp
//   job_full    jobs           the weight warp                                 all others
//   job_empty   jobs           each epilogue warp, activation and MMA warp     weight warp
//   drained     -              a commit of the MMA warp                        MMA warp
//
// CTAs 0 and 1 of a cluster are a pair, 2 and 3 the other. The MMA warp is that of its leader, the
// even one (or of the only CTA): it waits at the leader's barriers, and its commits arrive in both
// CTAs of the pair, those of x in the whole cluster. Fillers wait for the parity before theirs,
// which a fresh barrier reports as complete.
#pragma once

#include "device/cache_policy.h"
#include "device/job_ring.cuh"
#include "device/ptx.cuh"
#include "device/tcgen05.cuh"
#include "sm100/traits.cuh"

namespace spense::sm100 {

using device::Cursor;
// Hands segments from the weight warp to the other warps of the CTA.
template <class T>
using JobRing = device::JobRing<T, Job>;

// Fills the w ring of this CTA. It never waits for the kernel before: weights do not come from it.
template <class T>
class WeightLoader {
 public:
  __device__ WeightLoader(const Params& p, uint32_t smem, int rank)
      : p_(p), smem_(smem), rank_(rank) {
    full_ = T::kCtas == 1 ? smem + T::kWFull : ptx::remote_smem(smem + T::kWFull, rank & ~1);
  }

  // Publishes the segment and fetches its units. Missing tiles of the last group repeat the last
  // tile; their rows lie beyond n. Where this CTA's rows sit out it fetches its neighbour's unit:
  // the bytes to wait for stay the same, and metadata is always legal. Where both do, none.
  __device__ void load(int row_tile, const heuristics::Segment& s, JobRing<T>& jobs) {
    Job job{row_tile, s.token_tile, s.step_begin, s.step_end, s.first, s.last, {}, {}};
    int32_t begin[4];  // of the tiles, in blocks of the stream
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int tile = row_tile + t % T::kClusterSize;
      const int4 entry = __ldg(&p_.tiles[min(tile, p_.schedule.row_tiles - 1)]);
      begin[t] = entry.x;
      job.sparse[t] = entry.y;
    }
    jobs.put(job);
    const Units units(job, p_.schedule.k_blocks);
#pragma unroll 1
    for (int step = units.sparse_begin; step < units.sparse_end; ++step) {
      const int tile = holds_sparse(job, rank_, step) ? rank_ : rank_ ^ 1;
      if (T::kPairs > 1 && !holds_sparse(job, tile, step)) continue;
      put<kSparseUnitBytes>(pick(begin, tile), step, pick(job.sparse, tile));
    }
#pragma unroll 1
    for (int block = units.dense_begin; block < units.dense_end; ++block) {
      const int tile = holds_dense(job, rank_, block) ? rank_ : rank_ ^ 1;
      if (T::kPairs > 1 && !holds_dense(job, tile, block)) continue;
      const int32_t sparse = pick(job.sparse, tile);
      put<kDenseUnitBytes>(pick(begin, tile), block - sparse, sparse);
    }
  }

  // Until every slot is given back, so that no commit arrives in a CTA that has left.
  __device__ void finish() {
#pragma unroll 1
    for (int i = 0; i < T::kWStages; ++i) wait_for_slot(), at_.advance();
  }

 private:
  __device__ void wait_for_slot() const {
    ptx::barrier_wait(smem_ + T::kWEmpty + 8 * at_.slot, at_.parity ^ 1);
    __syncwarp();
  }

  // Unit `unit` of a tile.
  template <int kBytes>
  __device__ void put(int32_t tile_begin, int unit, int sparse_units) {
    wait_for_slot();
    if (ptx::lane_id() == 0) {
      const int64_t offset = static_cast<int64_t>(tile_begin) * format::kBlockBytes +
                             format::unit_offset(unit, sparse_units);
      const uint32_t slot = smem_ + at_.slot * T::kWStageBytes;
      const uint32_t full = full_ + 8 * at_.slot;
      if constexpr (T::kCtas == 1) {
        ptx::barrier_arrive_expect(smem_ + T::kWFull + 8 * at_.slot, kBytes);
        ptx::bulk_copy(slot, p_.w + offset, kBytes, full, p_.w_policy);
      } else {
        const CUtensorMap* map = kBytes == kSparseUnitBytes ? &p_.sparse_map : &p_.dense_map;
        if (rank_ % 2 == 0) {
          ptx::barrier_arrive_expect(smem_ + T::kWFull + 8 * at_.slot, T::kCtas * kBytes);
        }
        ptx::tensor_copy_2d_pair(slot, map, 0, static_cast<int>(offset / kRowBytes), full,
                                 p_.w_policy);
      }
    }
    at_.advance();
  }

  const Params& p_;
  uint32_t smem_, full_;
  int rank_;
  Cursor<T::kWStages> at_;
};

// Fetches this CTA's tokens of each block of x, or its share of them where the CTA of the same
// half in the other pair holds the same. One thread.
template <class T>
class ActivationLoader {
 public:
  __device__ ActivationLoader(const Params& p, uint32_t smem, int rank)
      : p_(p), smem_(smem), rank_(rank) {
    full_ = T::kCtas == 1 ? smem + T::kXFull : ptx::remote_smem(smem + T::kXFull, rank & ~1);
  }

  __device__ void load(const Job& job) {
    const int row =
        job.token_tile * T::kTokens + rank_ % 2 * T::kHeldTokens + rank_ / 2 * T::kXBoxTokens;
    const Units units(job, p_.schedule.k_blocks);
#pragma unroll 1
    for (int step = units.sparse_begin; step < units.sparse_end; ++step) {
      put(2 * step * kRowBytes, row);
      put((2 * step + 1) * kRowBytes, row);
    }
#pragma unroll 1
    for (int block = units.dense_begin; block < units.dense_end; ++block) {
      put(block * kRowBytes, row);
    }
  }

  __device__ void finish() {
#pragma unroll 1
    for (int i = 0; i < T::kXStages; ++i) wait_for_slot(), at_.advance();
  }

 private:
  __device__ void wait_for_slot() const {
    ptx::barrier_wait(smem_ + T::kXEmpty + 8 * at_.slot, at_.parity ^ 1);
  }

  __device__ void put(int column, int row) {
    wait_for_slot();
    const uint32_t full = full_ + 8 * at_.slot;
    const uint32_t slot = smem_ + T::kXRing + at_.slot * T::kXStageBytes;
    if constexpr (T::kCtas == 1) {
      ptx::barrier_arrive_expect(smem_ + T::kXFull + 8 * at_.slot, T::kXStageBytes);
      ptx::tensor_copy_2d(slot, &p_.x_map, column, row, full, device::kEvictLast);
    } else {
      if (rank_ % 2 == 0) {
        ptx::barrier_arrive_expect(smem_ + T::kXFull + 8 * at_.slot, T::kCtas * T::kXStageBytes);
      }
      if constexpr (T::kPairs == 1) {
        ptx::tensor_copy_2d_pair(slot, &p_.x_map, column, row, full, device::kEvictLast);
      } else {
        const uint16_t same_half = static_cast<uint16_t>(0b101 << rank_ % 2);
        ptx::tensor_copy_2d_pair_multicast(slot + rank_ / 2 * T::kXBoxTokens * kRowBytes, &p_.x_map,
                                           column, row, full, same_half, device::kEvictLast);
      }
    }
    at_.advance();
  }

  const Params& p_;
  uint32_t smem_, full_;
  int rank_;
  Cursor<T::kXStages> at_;
};

}  // namespace spense::sm100
