// SPDX-License-Identifier: Apache-2.0
// The MMA warp's loop over the rings. See loaders.cuh for the barriers.
#pragma once

#include "sm100/loaders.cuh"
#include "sm100/mma.cuh"

// Whether the sparse instructions of a tile are complete before its dense ones are issued. PTX
// promises the order of instructions that add to the same accumulator for one shape and kind; K is
// 64 for sparse ones and 32 for dense ones. It costs one drain a tile. Set to 0 only with proof.
#ifndef SPENSE_SM100_DRAIN
#define SPENSE_SM100_DRAIN 1
#endif

namespace spense::sm100 {

// One thread of a leader. It issues four instructions a unit for the rows of its pair.
template <class T>
class Multiplier {
 public:
  // `leader` is the rank of this CTA, the first of its pair.
  __device__ Multiplier(uint32_t smem, uint32_t tmem, int leader)
      : smem_(smem), tmem_(tmem), leader_(leader) {}

  // The next accumulator = the segment's part of the tile.
  __device__ void run(const Job& job, int k_blocks) {
    ptx::barrier_wait(smem_ + T::kSumsEmpty + 8 * sums_.slot, sums_.parity ^ 1);
    ptx::tmem_fence_after();
    const Units units(job, k_blocks);
    begun_[0] = begun_[1] = false;
#pragma unroll 1
    for (int step = units.sparse_begin; step < units.sparse_end; ++step) {
      const bool first = holds_sparse(job, leader_, step),
                 second = holds_sparse(job, leader_ + T::kCtas - 1, step);
      if (T::kPairs > 1 && !first && !second) {
        pass_x();
        pass_x();
      } else {
        sparse_unit(on(first, second));
      }
    }
    if constexpr (SPENSE_SM100_DRAIN) {
      if (units.sparse_begin < units.sparse_end && units.dense_begin < units.dense_end) drain();
    }
#pragma unroll 1
    for (int block = units.dense_begin; block < units.dense_end; ++block) {
      const bool first = holds_dense(job, leader_, block),
                 second = holds_dense(job, leader_ + T::kCtas - 1, block);
      if (T::kPairs > 1 && !first && !second) {
        pass_x();
      } else {
        dense_unit(on(first, second));
      }
    }
    ptx::tensor_commit<T::kCtas>(smem_ + T::kSumsFull + 8 * sums_.slot, pair());
    sums_.advance();
  }

 private:
  // Which rows a unit adds to, and whether they hold sums of this segment already: all do or none.
  struct Rows {
    ptx::RowsOff off;
    bool begun;
  };
  __device__ Rows on(bool first, bool second) {
    Rows rows;
    rows.off.cta[0] = first ? 0 : ~0u;
    rows.off.cta[1] = second ? 0 : ~0u;
    rows.begun = first ? begun_[0] : begun_[1];
    begun_[0] |= first;
    begun_[1] |= second;
    return rows;
  }

  __device__ void sparse_unit(const Rows& rows) {
    const uint32_t slot = wait_for_w(), sums = tmem_ + sums_.slot * T::kTokens;
    const uint32_t metadata = tmem_ + T::kMetadata + w_.slot * T::kMetadataColumns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t x_slot = wait_for_x();
      ptx::tmem_copy<T::kCtas>(metadata + metadata_step(2 * half),
                               metadata_block(slot + format::metadata_offset(0, 128 * half)));
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        ptx::mma_sparse<T::kCtas>(sums, operand(slot) + w_step(i),
                                  operand(x_slot) + sparse_x_step(i), metadata + metadata_step(i),
                                  instruction(kTileRows * T::kCtas, T::kTokens, true),
                                  rows.begun || i > 0, rows.off);
      }
      release_x();
    }
    release_w();
  }

  __device__ void dense_unit(const Rows& rows) {
    const uint32_t slot = wait_for_w(), x_slot = wait_for_x();
    const uint32_t sums = tmem_ + sums_.slot * T::kTokens;
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
      ptx::mma_dense<T::kCtas>(sums, operand(slot) + w_step(i), operand(x_slot) + dense_x_step(i),
                               instruction(kTileRows * T::kCtas, T::kTokens, false),
                               rows.begun || i > 0, rows.off);
    }
    release_x();
    release_w();
  }

  // A block of x that only the other pair needs.
  __device__ void pass_x() {
    wait_for_x();
    release_x();
  }

  __device__ void drain() {
    ptx::tensor_commit_here<T::kCtas>(smem_ + T::kDrained);
    ptx::barrier_wait(smem_ + T::kDrained, drained_);
    ptx::tmem_fence_after();
    drained_ ^= 1;
  }

  // The slots that come next, once they are filled.
  __device__ uint32_t wait_for_w() const {
    ptx::barrier_wait(smem_ + T::kWFull + 8 * w_.slot, w_.parity);
    ptx::tmem_fence_after();
    return smem_ + w_.slot * T::kWStageBytes;
  }
  __device__ uint32_t wait_for_x() const {
    ptx::barrier_wait(smem_ + T::kXFull + 8 * x_.slot, x_.parity);
    ptx::tmem_fence_after();
    return smem_ + T::kXRing + x_.slot * T::kXStageBytes;
  }
  // Given back when what was issued so far is complete.
  __device__ void release_w() {
    ptx::tensor_commit<T::kCtas>(smem_ + T::kWEmpty + 8 * w_.slot, pair());
    w_.advance();
  }
  __device__ void release_x() {
    constexpr uint16_t kEveryone = (1 << T::kClusterSize) - 1;
    ptx::tensor_commit<T::kCtas>(smem_ + T::kXEmpty + 8 * x_.slot, kEveryone);
    x_.advance();
  }

  __device__ uint16_t pair() const { return static_cast<uint16_t>(0b11 << leader_); }

  uint32_t smem_, tmem_;
  int leader_;
  bool begun_[2];
  uint32_t drained_ = 0;  // parity
  Cursor<T::kWStages> w_;
  Cursor<T::kXStages> x_;
  Cursor<T::kAccumulators> sums_;
};

}  // namespace spense::sm100
