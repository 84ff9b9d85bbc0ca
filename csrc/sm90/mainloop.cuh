// SPDX-License-Identifier: Apache-2.0
// The rings and the loops over them: a warp that fills each, and warpgroups that multiply.
//
//   barrier    one a slot of  completed by                                       waited for by
//   w_full     w ring         the copy's bytes, after the weight warp armed it   consumers
//   w_empty    w ring         each of the 8 consumer warps                       weight warp
//   x_full     x ring         the bytes of all copies of the cluster             consumers
//   x_empty    x ring         each consumer warp of each CTA of the cluster      activation warp
//   job_full   jobs           the weight warp                                    all others
//   job_empty  jobs           each consumer warp and the activation warp         weight warp
#pragma once

#include "device/ptx.cuh"
#include "sm90/mma.cuh"
#include "sm90/traits.cuh"

namespace spense::sm90 {

// A place in a ring and the parity of the pass over it.
template <int kStages>
struct Cursor {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Hands segments from the weight warp to the other warps of the CTA.
template <class T>
class JobRing {
 public:
  __device__ explicit JobRing(uint32_t smem) : smem_(smem) {}

  // The weight warp.
  __device__ void put(const Job& job) {
    if (filled_ == T::kJobStages) {
      ptx::barrier_wait(smem_ + T::kJobEmpty + 8 * at_.slot, at_.parity ^ 1);
    } else {
      ++filled_;
    }
    if (ptx::lane_id() == 0) {
      const uint32_t to = smem_ + T::kJobs + at_.slot * heuristics::kJobBytes;
      ptx::store_shared_v4(to, make_uint4(job.row_tile, job.token_tile, job.sparse, job.dense));
      ptx::store_shared_v4(to + 16, make_uint4(job.x_begin, job.x_end, job.first, job.last));
      ptx::barrier_arrive(smem_ + T::kJobFull + 8 * at_.slot);
    }
    __syncwarp();
    at_.advance();
  }

  // Everybody else: wait, read (as often as needed), done.
  __device__ void wait() const {
    ptx::barrier_wait(smem_ + T::kJobFull + 8 * at_.slot, at_.parity);
  }
  __device__ Job read() const {
    const uint32_t from = smem_ + T::kJobs + at_.slot * heuristics::kJobBytes;
    const uint4 a = ptx::load_shared_v4(from), b = ptx::load_shared_v4(from + 16);
    return Job{static_cast<int>(a.x), static_cast<int>(a.y), static_cast<int>(a.z),
               static_cast<int>(a.w), static_cast<int>(b.x), static_cast<int>(b.y),
               static_cast<int>(b.z), static_cast<int>(b.w)};
  }
  __device__ void done() {
    __syncwarp();
    if (ptx::lane_id() == 0) ptx::barrier_arrive(smem_ + T::kJobEmpty + 8 * at_.slot);
    at_.advance();
  }

 private:
  uint32_t smem_;
  Cursor<T::kJobStages> at_;
  int filled_ = 0;
};

// Fills the w ring of this CTA. It never waits for the kernel before: weights do not come from it.
template <class T>
class WeightLoader {
 public:
  __device__ WeightLoader(const Params& p, uint32_t smem) : p_(p), smem_(smem) {}

  // Publishes the segment and fetches its units. Missing tiles of the last group repeat the last
  // tile; their rows lie beyond n.
  __device__ void load(int row_tile, const heuristics::Segment& s, JobRing<T>& jobs) {
    const int4 entry = __ldg(&p_.tiles[min(row_tile, p_.schedule.row_tiles - 1)]);
    const int sparse_units = entry.y;
    const int x_begin = 2 * s.step_begin, x_end = min(2 * s.step_end, p_.schedule.k_blocks);
    const int sparse_begin = min(s.step_begin, sparse_units);
    const int sparse_end = min(s.step_end, sparse_units);
    const int dense_begin = max(x_begin - 2 * sparse_units, 0);
    const int dense_end = max(x_end - 2 * sparse_units, 0);
    jobs.put(Job{row_tile, s.token_tile, sparse_end - sparse_begin, dense_end - dense_begin,
                 x_begin, x_end, s.first, s.last});
    const uint8_t* tile = p_.w + static_cast<int64_t>(entry.x) * format::kBlockBytes;
    const uint8_t* dense = tile + static_cast<int64_t>(sparse_units) * kSparseUnitBytes;
    for (int u = sparse_begin; u < sparse_end; ++u) {
      put(tile + static_cast<int64_t>(u) * kSparseUnitBytes, kSparseUnitBytes, sparse_end - u);
    }
    for (int u = dense_begin; u < dense_end; ++u) {
      put(dense + static_cast<int64_t>(u) * kDenseUnitBytes, kDenseUnitBytes, dense_end - u);
    }
  }

 private:
  __device__ void put(const uint8_t* unit, uint32_t bytes, int units_left) {
    if (filled_ == T::kWStages) {
      ptx::barrier_wait(smem_ + T::kWEmpty + 8 * at_.slot, at_.parity ^ 1);
    } else if (++filled_ == T::kWStages && ptx::lane_id() == 0) {
      for (int i = 1; i <= min(p_.ahead, units_left - 1); ++i) {
        ptx::bulk_prefetch_l2(unit + static_cast<int64_t>(i) * bytes, bytes);
      }
    }
    if (ptx::lane_id() == 0) {
      const uint32_t full = smem_ + T::kWFull + 8 * at_.slot;
      ptx::barrier_arrive_expect(full, bytes);
      ptx::bulk_copy(smem_ + at_.slot * T::kWStageBytes, unit, bytes, full, p_.w_policy);
    }
    __syncwarp();
    at_.advance();
  }

  const Params& p_;
  uint32_t smem_;
  Cursor<T::kWStages> at_;
  int filled_ = 0;  // slots of the first pass, which need no wait
};

// Fetches this CTA's share of each block of x and hands it to the whole cluster.
template <class T>
class ActivationLoader {
 public:
  __device__ ActivationLoader(const Params& p, uint32_t smem, uint32_t rank)
      : p_(p), smem_(smem), rank_(rank) {}

  __device__ void load(const Job& job) {
    const int row = job.token_tile * T::kTokens + static_cast<int>(rank_) * T::kXBoxTokens;
    for (int block = job.x_begin; block < job.x_end; ++block) put(block * kRowBytes, row);
  }

 private:
  __device__ void put(int column, int row) {
    if (filled_ < T::kXStages) {
      ++filled_;
    } else if constexpr (T::kCluster > 1) {
      ptx::barrier_wait_cluster(smem_ + T::kXEmpty + 8 * at_.slot, at_.parity ^ 1);
    } else {
      ptx::barrier_wait(smem_ + T::kXEmpty + 8 * at_.slot, at_.parity ^ 1);
    }
    if (ptx::lane_id() == 0) {
      const uint32_t full = smem_ + T::kXFull + 8 * at_.slot;
      const uint32_t slot = smem_ + T::kXRing + at_.slot * T::kXStageBytes;
      ptx::barrier_arrive_expect(full, T::kXStageBytes);
      if constexpr (T::kCluster > 1) {
        constexpr uint16_t kEveryone = (1u << T::kCluster) - 1;
        ptx::tensor_copy_2d_multicast(slot + rank_ * T::kXBoxTokens * kRowBytes, &p_.x_map, column,
                                      row, full, kEveryone, ptx::kEvictLast);
      } else {
        ptx::tensor_copy_2d(slot, &p_.x_map, column, row, full, ptx::kEvictLast);
      }
    }
    __syncwarp();
    at_.advance();
  }

  const Params& p_;
  uint32_t smem_, rank_;
  Cursor<T::kXStages> at_;
  int filled_ = 0;
};

// One consumer warpgroup: 64 rows of the tile. wgmma runs one unit behind the issue, so that the
// barriers and metadata of a unit are read while the one before is multiplied.
template <class T>
class Multiplier {
 public:
  __device__ Multiplier(uint32_t smem, int warpgroup) : smem_(smem) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    values_ = smem + warpgroup * T::kWarpgroupRows * kRowBytes;
    // wgmma.sp's metadata: lane l holds row l / 4 + 8 * (l % 2) of its warp's 16, and of each 64
    // logical columns (8 bytes) word l / 2 % 2.
    const int row = warpgroup * T::kWarpgroupRows + warp * 16 + lane / 4 + 8 * (lane % 2);
    metadata_ = smem + format::metadata_offset(0, 0) + row * format::kMetadataRowBytes;
    second_word_ = lane / 2 % 2 != 0;
  }

  // sums = the segment's part of the tile. Every slot is given back when it returns.
  __device__ void run(float (&sums)[T::kSums], int sparse, int dense) {
    uint32_t even[4] = {}, odd[4] = {};
    accumulate_ = false;
    for (; sparse >= 2; sparse -= 2) {
      sparse_unit(sums, even, odd);
      sparse_unit(sums, odd, even);
    }
    if (sparse != 0) sparse_unit(sums, even, odd);
    for (; dense > 0; --dense) {
      dense_unit(sums);
      pin(even);  // still read by the last sparse unit until here
      pin(odd);
    }
    mma_wait<0>();
    release();
    pin(sums);
    pin(even);
    pin(odd);
  }

 private:
  __device__ __forceinline__ void sparse_unit(float (&sums)[T::kSums], uint32_t (&metadata)[4],
                                              uint32_t (&previous)[4]) {
    ptx::barrier_wait(smem_ + T::kWFull + 8 * w_.slot, w_.parity);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 row = ptx::load_shared_v4(metadata_ + w_.slot * T::kWStageBytes +
                                            half * kTileRows * format::kMetadataRowBytes);
      metadata[2 * half] = second_word_ ? row.y : row.x;
      metadata[2 * half + 1] = second_word_ ? row.w : row.z;
    }
    const uint64_t w = operand(values_ + w_.slot * T::kWStageBytes);
    const uint64_t x0 = next_x();
    const uint64_t x1 = next_x();
    multiply(sums, previous, 2, [&](auto& to, int i, bool accumulate) {
      constexpr int kXStep = 64 >> 4, kWStep = 32 >> 4;  // bytes of 64 logical columns
      mma_sparse<T::kTokens>(to, w + i * kWStep, (i < 2 ? x0 : x1) + i % 2 * kXStep, metadata[i],
                             accumulate);
    });
  }

  __device__ __forceinline__ void dense_unit(float (&sums)[T::kSums]) {
    ptx::barrier_wait(smem_ + T::kWFull + 8 * w_.slot, w_.parity);
    const uint64_t w = operand(values_ + w_.slot * T::kWStageBytes);
    const uint64_t x = next_x();
    uint32_t none[1] = {};
    multiply(sums, none, 1, [&](auto& to, int i, bool accumulate) {
      constexpr int kStep = 32 >> 4;
      mma_dense<T::kTokens>(to, w + i * kStep, x + i * kStep, accumulate);
    });
  }

  // Waits for the next block of x and returns its operand.
  __device__ __forceinline__ uint64_t next_x() {
    ptx::barrier_wait(smem_ + T::kXFull + 8 * x_.slot, x_.parity);
    const uint64_t x = operand(smem_ + T::kXRing + x_.slot * T::kXStageBytes);
    x_.advance();
    return x;
  }

  // Issues the four instructions of a unit and retires the unit before it.
  template <int kCount, class Issue>
  __device__ __forceinline__ void multiply(float (&sums)[T::kSums], uint32_t (&previous)[kCount],
                                           int blocks, Issue issue) {
    if constexpr (T::kPromoted) {
      float part[T::kSums];
      mma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) issue(part, i, i != 0);
      mma_commit();
      mma_wait<0>();
      pin(part);
#pragma unroll
      for (int i = 0; i < T::kSums; ++i) sums[i] = accumulate_ ? sums[i] + part[i] : part[i];
      accumulate_ = true;
      under_way_ = blocks;
      release();
    } else {
      pin(sums);
      mma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) issue(sums, i, i != 0 || accumulate_);
      mma_commit();
      accumulate_ = true;
      mma_wait<1>();
      pin(previous);
      release();
      under_way_ = blocks;
    }
    w_.advance();
  }

  // Gives back the oldest unit's slot of w and its slots of x.
  __device__ __forceinline__ void release() {
    if (under_way_ == 0) return;
    if (ptx::lane_id() == 0) ptx::barrier_arrive(smem_ + T::kWEmpty + 8 * w_done_.slot);
    w_done_.advance();
    release_x();
    if (under_way_ == 2) release_x();
    under_way_ = 0;
  }
  __device__ __forceinline__ void release_x() {
    const uint32_t empty = smem_ + T::kXEmpty + 8 * x_done_.slot, lane = ptx::lane_id();
    if constexpr (T::kCluster > 1) {
      if (lane < T::kCluster) ptx::barrier_arrive_remote(empty, lane);
    } else {
      if (lane == 0) ptx::barrier_arrive(empty);
    }
    x_done_.advance();
  }

  uint32_t smem_, values_, metadata_;
  bool second_word_, accumulate_ = false;
  Cursor<T::kWStages> w_, w_done_;
  Cursor<T::kXStages> x_, x_done_;
  int under_way_ = 0;  // blocks of x of the unit that is being multiplied, 0 for none
};

}  // namespace spense::sm90
