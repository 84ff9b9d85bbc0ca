// SPDX-License-Identifier: Apache-2.0
// The consumers' loop over the rings. See loaders.cuh for the barriers.
#pragma once

#include "sm90/loaders.cuh"
#include "sm90/mma.cuh"

namespace spense::sm90 {

// One consumer warpgroup. With one row tile a CTA it multiplies 64 of its rows, with two it has a
// tile for itself. It works block by block of x: the instructions of a block are one group, and
// while they run the next block's barriers and metadata are read and the block before is given
// back. That keeps a slot of x no longer than its latency and two blocks' work.
template <class T>
class Multiplier {
 public:
  using Sums = float (&)[T::kParts][T::kSums];
  using Metadata = uint32_t (&)[T::kParts][2];

  __device__ Multiplier(uint32_t smem, int warpgroup) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int tile = T::kRowTiles == 2 ? warpgroup : 0;
    const int row0 = T::kRowTiles == 2 ? 0 : warpgroup * T::kPartRows;
    const uint32_t ring = smem + tile * T::kWStages * T::kWStageBytes;
    w_full_ = smem + T::kWFull + 8 * tile * T::kWStages;
    w_empty_ = smem + T::kWEmpty + 8 * tile * T::kWStages;
    x_ring_ = smem + T::kXRing;
    x_full_ = smem + T::kXFull;
    x_empty_ = smem + T::kXEmpty;
    values_ = ring + row0 * kRowBytes;
    // wgmma.sp's metadata: lane l holds row l / 4 + 8 * (l % 2) of its warp's 16, and of each 64
    // logical columns (8 bytes) word l / 2 % 2.
    const int row = row0 + warp * 16 + lane / 4 + 8 * (lane % 2);
    metadata_ = ring + format::metadata_offset(row, 0);
    second_word_ = lane / 2 % 2 != 0;
  }

  // sums = the segment's part of the tile. Every slot is given back when it returns.
  __device__ void run(Sums sums, int sparse, int dense) {
    uint32_t first[T::kParts][2] = {}, second[T::kParts][2] = {};
    accumulate_ = false;
    for (; sparse > 0; --sparse) {
      ptx::barrier_wait(w_full_ + 8 * w_.slot, w_.parity);
      sparse_block<0>(sums, first, second);
      sparse_block<1>(sums, second, first);
      w_.advance();
    }
    for (; dense > 0; --dense) {
      ptx::barrier_wait(w_full_ + 8 * w_.slot, w_.parity);
      dense_block(sums, second);
      w_.advance();
    }
    ptx::mma_wait<0>();
    release();
    ptx::pin(sums);
    ptx::pin(second);
  }

 private:
  // Half of a sparse unit: 128 logical columns, two instructions for each part.
  template <int kHalf>
  __device__ __forceinline__ void sparse_block(Sums sums, Metadata metadata, Metadata previous) {
    const uint32_t slot = w_.slot * T::kWStageBytes;
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      const uint4 row = ptx::load_shared_v4(
          metadata_ + slot + format::metadata_offset(part * T::kPartRows, kHalf * 128) -
          format::metadata_offset(0, 0));
      metadata[part][0] = second_word_ ? row.y : row.x;
      metadata[part][1] = second_word_ ? row.w : row.z;
    }
    const uint64_t w = operand(values_ + slot + kHalf * kRowBytes / 2);
    const uint64_t x = next_x();
    const auto issue = [&](auto& to, int part, int i, bool accumulate) {
      constexpr int kXStep = 64 >> 4, kWStep = 32 >> 4;  // bytes of 64 logical columns
      mma_sparse<T::kTokens>(to, w + part * kPartStep + i * kWStep, x + i * kXStep,
                             metadata[part][i], accumulate);
    };
    multiply<kHalf == 1, 2>(sums, metadata, previous, issue);
  }

  // A dense unit: 128 columns, four instructions for each part.
  __device__ __forceinline__ void dense_block(Sums sums, Metadata previous) {
    const uint64_t w = operand(values_ + w_.slot * T::kWStageBytes);
    const uint64_t x = next_x();
    const auto issue = [&](auto& to, int part, int i, bool accumulate) {
      constexpr int kStep = 32 >> 4;
      mma_dense<T::kTokens>(to, w + part * kPartStep + i * kStep, x + i * kStep, accumulate);
    };
    multiply<true, 4>(sums, previous, previous, issue);
  }

  // Waits for the next block of x and returns its operand.
  __device__ __forceinline__ uint64_t next_x() {
    ptx::barrier_wait(x_full_ + 8 * x_.slot, x_.parity);
    const uint64_t x = operand(x_ring_ + x_.slot * T::kXStageBytes);
    x_.advance();
    return x;
  }

  // Issues the instructions of a block and retires the block before it. The instructions under way
  // may read the metadata of both until then.
  template <bool kEndsUnit, int kInstructions, class Issue>
  __device__ __forceinline__ void multiply(Sums sums, Metadata mine, Metadata previous,
                                           Issue issue) {
    if constexpr (T::kPromoted) {
      // The sums of a unit start from zero and are added in float32.
      ptx::pin(unit_sums_);
      ptx::mma_fence();
#pragma unroll
      for (int i = 0; i < kInstructions; ++i) {
        issue_parts(unit_sums_, issue, i, i != 0 || inside_unit_);
      }
      ptx::mma_commit();
      inside_unit_ = !kEndsUnit;
      if constexpr (kEndsUnit) {
        ptx::mma_wait<0>();
        ptx::pin(unit_sums_);
        ptx::pin(mine);
        ptx::pin(previous);
        release();
        add_unit(sums);
      }
      note_under_way(kEndsUnit);
      if constexpr (kEndsUnit) release();
    } else {
      ptx::pin(sums);
      ptx::mma_fence();
#pragma unroll
      for (int i = 0; i < kInstructions; ++i) issue_parts(sums, issue, i, i != 0 || accumulate_);
      ptx::mma_commit();
      accumulate_ = true;
      ptx::mma_wait<1>();
      ptx::pin(previous);
      release();
      note_under_way(kEndsUnit);
    }
  }

  __device__ __forceinline__ void add_unit(Sums sums) {
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < T::kSums; ++i) {
        const float v = unit_sums_[part][i];
        sums[part][i] = accumulate_ ? sums[part][i] + v : v;
      }
    }
    accumulate_ = true;
  }

  template <class Issue>
  __device__ __forceinline__ static void issue_parts(Sums sums, Issue issue, int i,
                                                     bool accumulate) {
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) issue(sums[part], part, i, accumulate);
  }

  __device__ __forceinline__ void note_under_way(bool ends_unit) {
    under_way_ = true;
    ends_unit_ = ends_unit;
  }

  // Gives back the block of x that was under way, and its unit of w when that ends with it.
  __device__ __forceinline__ void release() {
    if (!under_way_) return;
    const uint32_t lane = ptx::lane_id();
    if (ends_unit_) {
      if (lane == 0) ptx::barrier_arrive(w_empty_ + 8 * w_done_.slot);
      w_done_.advance();
    }
    const uint32_t empty = x_empty_ + 8 * x_done_.slot;
    if constexpr (T::kCluster > 1) {
      if (lane < T::kCluster) ptx::barrier_arrive_remote(empty, lane);
    } else {
      if (lane == 0) ptx::barrier_arrive(empty);
    }
    x_done_.advance();
    under_way_ = false;
  }

  static constexpr uint64_t kPartStep = T::kPartRows * kRowBytes >> 4;

  uint32_t w_full_, w_empty_, x_ring_, x_full_, x_empty_, values_, metadata_;
  bool second_word_, accumulate_ = false;
  bool under_way_ = false, ends_unit_ = false;  // of the block that is being multiplied
  Cursor<T::kWStages> w_, w_done_;
  Cursor<T::kXStages> x_, x_done_;
  // Of the unit under way, when they are promoted.
  float unit_sums_[T::kParts][T::kPromoted ? T::kSums : 1];
  bool inside_unit_ = false;
};

}  // namespace spense::sm90
