// SPDX-License-Identifier: Apache-2.0
// The consumers' loop over the rings. See loaders.cuh for the barriers.
#pragma once

#include "sm90/loaders.cuh"
#include "sm90/mma.cuh"

namespace spense::sm90 {

// One consumer warpgroup. With one row tile a CTA it multiplies 64 of its rows, with two it has a
// tile for itself. It works batch by batch: what a slot of x is for, or a dense unit; the
// instructions of a batch are one group. With kPromote it waits for each and adds what the tensor
// cores have summed up, at their own precision, to the float32 sums. Else it waits for the next
// batch's barriers and reads its metadata while the tensor cores are busy, which takes as long as a
// small tile's multiplication, then for the batch, starts the next and gives back what the one
// before read.
template <class T>
class Multiplier {
 public:
  using Sums = float (&)[T::kParts][T::kSums];

  __device__ Multiplier(uint32_t smem, int warpgroup) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int tile = T::kRowTiles == 2 ? warpgroup : 0;
    const int row0 = T::kRowTiles == 2 ? 0 : warpgroup * T::kPartRows;
    const uint32_t ring = smem + tile * T::kWStages * T::kWStageBytes;
    w_full_ = smem + T::kWFull + 8 * tile * T::kWStages;
    w_empty_ = smem + T::kWEmpty + 8 * tile * T::kWStages;
    x_full_ = smem + T::kXFull;
    x_empty_ = smem + T::kXEmpty;
    values_ = operand(ring + row0 * kRowBytes);
    x_ring_smem_ = smem + T::kXRing;
    x_ring_ = operand(x_ring_smem_);
    // wgmma.sp's metadata: lane l holds row l / 4 + 8 * (l % 2) of its warp's 16, and of each 64
    // logical columns (8 bytes) word l / 2 % 2.
    const int metadata_row = row0 + warp * 16 + lane / 4 + 8 * (lane % 2);
    metadata_ = ring + format::metadata_offset(metadata_row, 0);
    second_word_ = lane / 2 % 2 != 0;
  }

  // sums = the part of the tile that the turns [begin, end) of the walk make up. When it returns,
  // every slot is given back but the last one of x with T::kStagedInSlot: no warpgroup reads that
  // any more, and finished tiles go through it until the next run.
  __device__ void run(Sums sums, const heuristics::Walk& walk, int begin, int end, int sparse_units,
                      int k_blocks) {
    inside_ = false;
    if constexpr (T::kPromote) clear(sums);
    // With kPromote the tensor cores' sums of each block of a batch, at their own precision.
    float batch[kBatchSums][T::kPromote ? T::kParts : 1][T::kPromote ? T::kSums : 1];
    Metadata metadata = {};
    heuristics::Turns turns(walk, begin);
#pragma unroll 1
    for (int left = end - begin; left > 0; --left) {
      const int step = turns.next();
      if (step < sparse_units) {
        sparse_step(sums, batch, metadata);
      } else {
        dense_step(sums, batch, metadata, min(2, k_blocks - 2 * step));
      }
    }
    if constexpr (!T::kPromote) retire(sums, metadata);
    if constexpr (T::kStagedInSlot) {
      const uint32_t x_ends = x_ends_;
      x_ends_ = 0;
      release();
      x_ends_ = x_ends;
      lent_ = true;
      ptx::named_barrier_sync(kConsumersBarrier, T::kConsumerThreads);
    } else if constexpr (!T::kPromote) {
      release();
    }
    if constexpr (!T::kStagedInSlot) x_ends_ = 0;
    w_ends_ = 0;
  }
  __device__ uint32_t lent_slot() const {
    const int slot = (x_ends_ - x_empty_) / 8;
    return x_ring_smem_ + slot * T::kXStageBytes;
  }

 private:
  static constexpr int kConsumersBarrier = 1 + heuristics::kConsumerWarpgroups;
  static constexpr int kSparseColumns = 64, kDenseColumns = 32;  // of an instruction
  // Blocks of 128 columns in a batch of a sparse unit: larger tiles have no registers for the sums
  // of two blocks, which are promoted one by one.
  static constexpr int kBlocks = T::kPromote && T::kTokens > 32 ? 1 : T::kXBlocks;
  static constexpr int kBatchSums = T::kPromote ? kBlocks : 1;
  // Instructions of a batch and, of their operands, 16-byte steps along a row.
  static constexpr int kSparseSteps = kBlocks * format::kDenseUnitColumns / kSparseColumns;
  static constexpr int kDenseSteps = format::kDenseUnitColumns / kDenseColumns;
  static constexpr uint64_t kPartStep = T::kPartRows * kRowBytes >> 4;
  static constexpr uint64_t kXBlockStep = T::kXBlockBytes >> 4;
  static constexpr uint64_t kXStageStep = T::kXStageBytes >> 4, kWStageStep = T::kWStageBytes >> 4;

  using Metadata = uint32_t[T::kParts][kSparseSteps];
  using Batch = float (&)[kBatchSums][T::kPromote ? T::kParts : 1][T::kPromote ? T::kSums : 1];

  // A sparse unit, 256 logical columns: one batch or two.
  __device__ __forceinline__ void sparse_step(Sums sums, Batch batch, Metadata& metadata) {
    constexpr int kBatches = 2 / kBlocks;
    constexpr bool kSharedSlot = kBlocks < T::kXBlocks;  // both batches of one slot of x
    ptx::barrier_wait(w_full_ + 8 * w_.slot, w_.parity);
    uint64_t x = 0;
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      uint4 rows[T::kParts][kBlocks];
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          const int column = (b * kBlocks + i) * format::kDenseUnitColumns;
          rows[part][i] = ptx::load_shared_v4(metadata_ + w_.slot * T::kWStageBytes +
                                              format::metadata_offset(part * T::kPartRows, column) -
                                              format::metadata_offset(0, 0));
        }
      }
      const uint64_t w = values_ + w_.slot * kWStageStep + b * kBlocks * kRowBytes / 32;
      x = kSharedSlot && b > 0 ? x + kXBlockStep : next_x();
      if constexpr (!T::kPromote) retire(sums, metadata);
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          const uint4 row = rows[part][i];
          metadata[part][2 * i] = second_word_ ? row.y : row.x;
          metadata[part][2 * i + 1] = second_word_ ? row.w : row.z;
        }
      }
      begin(sums, batch);
#pragma unroll
      for (int i = 0; i < kSparseSteps; ++i) {
        constexpr int kXStep = kSparseColumns >> 4, kWStep = kSparseColumns / 2 >> 4;
        const uint64_t x_step = i / 2 * kXBlockStep + i % 2 * kXStep;
#pragma unroll
        for (int part = 0; part < T::kParts; ++part) {
          mma_sparse<T::kTokens>(target(sums, batch, i / 2, part),
                                 w + part * kPartStep + i * kWStep, x + x_step, metadata[part][i],
                                 accumulate(T::kPromote ? i % 2 : i));
        }
      }
      const bool last = b == kBatches - 1;
      end<kBatchSums>(sums, batch, metadata, last ? w_empty_ + 8 * w_.slot : 0,
                      last || !kSharedSlot ? x_empty_ + 8 * x_.slot : 0);
      if (last || !kSharedSlot) x_.advance();
    }
    w_.advance();
  }

  // One or two dense units of 128 columns, a batch each.
  __device__ __forceinline__ void dense_step(Sums sums, Batch batch, Metadata& metadata,
                                             int units) {
    uint64_t x = 0;
#pragma unroll 1
    for (int i = 0; i < units; ++i) {
      ptx::barrier_wait(w_full_ + 8 * w_.slot, w_.parity);
      const uint64_t w = values_ + w_.slot * kWStageStep;
      const bool first = T::kXBlocks == 1 || i == 0, last = T::kXBlocks == 1 || i == units - 1;
      x = first ? next_x() : x + kXBlockStep;
      if constexpr (!T::kPromote) retire(sums, metadata);
      begin(sums, batch);
#pragma unroll
      for (int j = 0; j < kDenseSteps; ++j) {
        constexpr int kStep = kDenseColumns >> 4;
#pragma unroll
        for (int part = 0; part < T::kParts; ++part) {
          mma_dense<T::kTokens>(target(sums, batch, 0, part), w + part * kPartStep + j * kStep,
                                x + j * kStep, accumulate(j));
        }
      }
      end<1>(sums, batch, metadata, w_empty_ + 8 * w_.slot, last ? x_empty_ + 8 * x_.slot : 0);
      if (last) x_.advance();
      w_.advance();
    }
  }

  // Waits for the next slot of x and returns its operand.
  __device__ __forceinline__ uint64_t next_x() {
    ptx::barrier_wait(x_full_ + 8 * x_.slot, x_.parity);
    return x_ring_ + x_.slot * kXStageStep;
  }

  // Waits for the batch that is being multiplied, which reads its metadata until then.
  __device__ __forceinline__ static void retire(Sums sums, Metadata& metadata) {
    ptx::mma_wait<0>();
    ptx::pin(metadata);
    ptx::pin(sums);
  }

  __device__ __forceinline__ void begin(Sums sums, Batch batch) {
    if constexpr (T::kPromote) {
      ptx::pin(batch);
    } else {
      ptx::pin(sums);
    }
    ptx::mma_fence();
  }
  __device__ __forceinline__ static auto& target(Sums sums, Batch batch, int block, int part) {
    if constexpr (T::kPromote) {
      return batch[block][part];
    } else {
      return sums[part];
    }
  }
  // Whether instruction i of a batch, or with kPromote of a block, adds to what there is.
  __device__ __forceinline__ bool accumulate(int i) const {
    return i != 0 || (!T::kPromote && inside_);
  }
  // Ends the group of instructions of a batch of so many blocks' sums, with which a unit of w and a
  // slot of x end, or one of them: their barriers, or 0. Gives back what the batch read, or without
  // kPromote the one before.
  template <int kUsed>
  __device__ __forceinline__ void end(Sums sums, Batch batch, Metadata& metadata, uint32_t w_ends,
                                      uint32_t x_ends) {
    ptx::mma_commit();
    inside_ = true;
    if constexpr (!T::kPromote) release();
    w_ends_ = w_ends;
    x_ends_ = x_ends;
    if constexpr (T::kPromote) {
      ptx::mma_wait<0>();
      ptx::pin(metadata);
      release();
      ptx::pin(batch);
#pragma unroll
      for (int block = 0; block < kUsed; ++block) {
#pragma unroll
        for (int part = 0; part < T::kParts; ++part) {
#pragma unroll
          for (int i = 0; i < T::kSums; ++i) sums[part][i] += batch[block][part][i];
        }
      }
    }
  }

  // Gives back what a batch read that has been waited for.
  __device__ __forceinline__ void release() {
    if constexpr (T::kStagedInSlot) {
      if (lent_ && threadIdx.x % 128 == 0) ptx::store_wait_read<0>();
      lent_ = false;
    }
    __syncwarp();  // all lanes have read their metadata
    if (w_ends_ != 0) arrive<1>(w_ends_);
    if (x_ends_ != 0) arrive<T::kClusterSize>(x_ends_);
  }
  // Arrives once a warp, at the barriers of all that share the slot.
  template <int kSharers>
  __device__ __forceinline__ static void arrive(uint32_t barrier) {
    const int lane = static_cast<int>(ptx::lane_id());
    if constexpr (kSharers > 1) {
      if (lane < kSharers) ptx::barrier_arrive_remote(barrier, lane);
    } else {
      if (lane == 0) ptx::barrier_arrive(barrier);
    }
  }

  uint32_t w_full_, w_empty_, x_ring_smem_, x_full_, x_empty_, metadata_;
  uint64_t values_, x_ring_;  // operands of the rings' first slots
  bool second_word_;
  uint32_t w_ends_ = 0, x_ends_ = 0;  // barriers of what ends with the batch under way, or 0
  bool lent_ = false;                 // finished sums may be on their way out of that slot of x
  Cursor<T::kWStages> w_;
  Cursor<T::kXStages> x_;
  bool inside_ = false;  // whether the sums have begun
};

}  // namespace spense::sm90
