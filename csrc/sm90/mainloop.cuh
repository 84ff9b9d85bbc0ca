// SPDX-License-Identifier: Apache-2.0
// The consumers' loop over the rings. See loaders.cuh for the barriers.
#pragma once

#include "sm90/loaders.cuh"
#include "sm90/mma.cuh"

namespace spense::sm90 {

// One consumer warpgroup. With one row tile a CTA it multiplies 64 of its rows, with two it has a
// tile for itself. It works block by block of x: the instructions of a block are one group. With
// kPromote it waits for each; else the next block's barriers and metadata are read meanwhile and
// the block before is given back, which keeps a slot of x no longer than its latency and two
// blocks' work.
template <class T>
class Multiplier {
 public:
  using Sums = float (&)[T::kParts][T::kSums];

  // first_sharer: the CTA of the cluster that is first of those that share x.
  __device__ Multiplier(uint32_t smem, int warpgroup, int first_sharer)
      : first_sharer_(first_sharer) {
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
    const int metadata_row = row0 + warp * 16 + lane / 4 + 8 * (lane % 2);
    metadata_ = ring + format::metadata_offset(metadata_row, 0);
    second_word_ = lane / 2 % 2 != 0;
  }

  // sums = the part of the tile that the turns [begin, end) of the walk make up. Every slot is
  // given back when it returns.
  __device__ void run(Sums sums, const heuristics::Walk& walk, int begin, int end, int sparse_units,
                      int k_blocks) {
    inside_ = false;
    if (T::kPromote || (T::kSplits > 1 && begin == end)) clear(sums);
    uint32_t first[T::kParts][2] = {}, second[T::kParts][2] = {};
    for (int turn = begin; turn < end; ++turn) {
      const int step = walk.step(turn);
      if (step < sparse_units) {
        ptx::barrier_wait(w_full_ + 8 * w_.slot, w_.parity);
        sparse_block<0>(sums, first, second);
        sparse_block<1>(sums, second, first);
        w_.advance();
      } else {
        for (int block = 2 * step; block < min(2 * step + 2, k_blocks); ++block) {
          ptx::barrier_wait(w_full_ + 8 * w_.slot, w_.parity);
          dense_block(sums);
          w_.advance();
        }
      }
    }
    if constexpr (!T::kPromote) {
      ptx::mma_wait<0>();
      release();
    }
    ptx::pin(sums);
    ptx::pin(first);
    ptx::pin(second);
  }

 private:
  __device__ __forceinline__ static void clear(Sums sums) {
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < T::kSums; ++i) sums[part][i] = 0;
    }
  }

  template <int kHalf>
  __device__ __forceinline__ uint4 metadata_row(int part) const {
    return ptx::load_shared_v4(metadata_ + w_.slot * T::kWStageBytes +
                               format::metadata_offset(part * T::kPartRows, kHalf * 128) -
                               format::metadata_offset(0, 0));
  }

  // Half of a sparse unit: 128 logical columns, two instructions for each part.
  template <int kHalf>
  __device__ __forceinline__ void sparse_block(Sums sums, uint32_t (&metadata)[T::kParts][2],
                                               uint32_t (&previous)[T::kParts][2]) {
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      const uint4 row = metadata_row<kHalf>(part);
      metadata[part][0] = second_word_ ? row.y : row.x;
      metadata[part][1] = second_word_ ? row.w : row.z;
    }
    const uint64_t w = operand(values_ + w_.slot * T::kWStageBytes + kHalf * kRowBytes / 2);
    const uint64_t x = next_x();
    const auto issue = [&](auto& to, int part, int i, bool accumulate) {
      constexpr int kXStep = 64 >> 4, kWStep = 32 >> 4;  // bytes of 64 logical columns
      mma_sparse<T::kTokens>(to, w + part * kPartStep + i * kWStep, x + i * kXStep,
                             metadata[part][i], accumulate);
    };
    multiply<kHalf == 1, 2>(sums, issue);
    ptx::pin(previous);
  }

  // A dense unit: 128 columns, four instructions for each part.
  __device__ __forceinline__ void dense_block(Sums sums) {
    const uint64_t w = operand(values_ + w_.slot * T::kWStageBytes);
    const uint64_t x = next_x();
    const auto issue = [&](auto& to, int part, int i, bool accumulate) {
      constexpr int kStep = 32 >> 4;
      mma_dense<T::kTokens>(to, w + part * kPartStep + i * kStep, x + i * kStep, accumulate);
    };
    multiply<true, 4>(sums, issue);
  }

  // Waits for the next block of x and returns its operand.
  __device__ __forceinline__ uint64_t next_x() {
    ptx::barrier_wait(x_full_ + 8 * x_.slot, x_.parity);
    const uint64_t x = operand(x_ring_ + x_.slot * T::kXStageBytes);
    x_.advance();
    return x;
  }

  // Issues the instructions of a block. With kPromote it waits for them and adds what the tensor
  // cores have summed up, at their own precision, to the float32 sums; else it retires the block
  // before, and the instructions under way may read the metadata of both until then.
  template <bool kEndsUnit, int kInstructions, class Issue>
  __device__ __forceinline__ void multiply(Sums sums, Issue issue) {
    if constexpr (T::kPromote) {
      float block[T::kParts][T::kSums];  // which its first instruction does not read
      ptx::pin(block);
      ptx::mma_fence();
#pragma unroll
      for (int i = 0; i < kInstructions; ++i) issue_parts(block, issue, i, i != 0);
      ptx::mma_commit();
      ptx::mma_wait<0>();
      note_under_way(kEndsUnit);
      release();
      ptx::pin(block);
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) {
#pragma unroll
        for (int i = 0; i < T::kSums; ++i) sums[part][i] += block[part][i];
      }
    } else {
      ptx::pin(sums);
      ptx::mma_fence();
#pragma unroll
      for (int i = 0; i < kInstructions; ++i) issue_parts(sums, issue, i, i != 0 || inside_);
      ptx::mma_commit();
      inside_ = true;
      ptx::mma_wait<1>();
      release();
      note_under_way(kEndsUnit);
    }
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
    __syncwarp();  // all lanes have read their metadata
    if (ends_unit_) {
      arrive<1>(w_empty_ + 8 * w_done_.slot, 0);
      w_done_.advance();
    }
    arrive<T::kClusterRows>(x_empty_ + 8 * x_done_.slot, first_sharer_);
    x_done_.advance();
    under_way_ = false;
  }
  // Arrives once a warp, at the barriers of all that share the slot.
  template <int kSharers>
  __device__ __forceinline__ static void arrive(uint32_t barrier, int first) {
    const int lane = static_cast<int>(ptx::lane_id());
    if constexpr (kSharers > 1) {
      if (lane < kSharers) ptx::barrier_arrive_remote(barrier, first + lane);
    } else {
      if (lane == 0) ptx::barrier_arrive(barrier);
    }
  }

  static constexpr uint64_t kPartStep = T::kPartRows * kRowBytes >> 4;

  int first_sharer_;
  uint32_t w_full_, w_empty_, x_ring_, x_full_, x_empty_, values_, metadata_;
  bool second_word_;
  bool under_way_ = false;  // a block of x is being multiplied,
  bool ends_unit_ = false;  // with which its unit ends
  Cursor<T::kWStages> w_, w_done_;
  Cursor<T::kXStages> x_, x_done_;
  bool inside_ = false;  // whether the sums have begun
};

}  // namespace spense::sm90
