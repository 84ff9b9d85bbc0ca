// SPDX-License-Identifier: Apache-2.0
// Sums and maxima over the threads of one or several rows: a CTA, or a cluster of CTAs that share
// the columns of one row. Every warp tells its part to all CTAs, then one barrier, then every warp
// adds up all parts, in the same order everywhere.
#pragma once

#include "cuda/rows.cuh"
#include "device/ptx.cuh"
#include "device/ptx_rows.cuh"

namespace spense::cuda {
namespace {

constexpr int kMaxCluster = 8;
constexpr int kMaxWarps = 32;

struct Team {
  uint32_t rank, size;  // of the cluster
};

// Parts of kRows rows; only the threads of a single row span a cluster. Other CTAs' parts come as
// asynchronous stores that an mbarrier counts: a cluster barrier that orders plain stores costs a
// fence of all memory.
template <typename V, int kRows>
struct Parts {
  static constexpr int kSlots = kRows == 1 ? kMaxCluster * kMaxWarps : kMaxWarps;
  V of_warp[kRows][kSlots];
  uint64_t arrived;

  __device__ void init() { ptx::barrier_init(ptx::smem_address(&arrived), 1); }

  // A warp's part of a row; every lane has it.
  __device__ void put(const Team& team, int row, V v) {
    const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (kRows > 1 || team.size == 1) {
      if (lane == 0) of_warp[row][warp] = v;
      return;
    }
    const uint32_t barrier = ptx::smem_address(&arrived);
    const uint32_t to = ptx::smem_address(&of_warp[0][team.rank * warps + warp]);
    if (threadIdx.x == 0) {
      ptx::barrier_arrive_expect(barrier, team.size * warps * static_cast<uint32_t>(sizeof(V)));
    }
    if (lane < team.size) {
      ptx::store_async(ptx::remote_address(to, lane), v, ptx::remote_address(barrier, lane));
    }
  }
  __device__ void wait(const Team& team, uint32_t phase) {
    if (kRows > 1 || team.size == 1) {
      __syncthreads();
    } else {
      ptx::barrier_wait(ptx::smem_address(&arrived), phase);
    }
  }
  __device__ int slots(const Team& team) const {
    const int warps = static_cast<int>(blockDim.x / 32);
    return kRows == 1 ? warps * static_cast<int>(team.size) : warps;
  }
};

// Sums of all rows. A lane gets that of row lane / (32 / kRows).
template <int kRows>
__device__ double sum_rows(double (&v)[kRows], const Team& team, Parts<double, kRows>& parts,
                           uint32_t phase) {
  constexpr int kLanes = 32 / kRows;  // of a row
  const int lane = threadIdx.x % 32;
  // Halves of the warp exchange rows, so that the shuffles are hardly more than for one row.
#pragma unroll
  for (int rows = kRows, step = 16; rows > 1; rows /= 2, step /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < rows / 2; ++i) {
      const double kept = upper ? v[i + rows / 2] : v[i];
      const double given = upper ? v[i] : v[i + rows / 2];
      v[i] = kept + __shfl_xor_sync(~0u, given, step);
    }
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) v[0] += __shfl_xor_sync(~0u, v[0], step);
  const int row = lane / kLanes;
  if constexpr (kRows == 1) {
    parts.put(team, 0, v[0]);
  } else {
    if (lane % kLanes == 0) parts.of_warp[row][threadIdx.x / 32] = v[0];
  }
  parts.wait(team, phase);
  double total = 0.0;
#pragma unroll 4
  for (int i = lane % kLanes; i < parts.slots(team); i += kLanes) total += parts.of_warp[row][i];
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  return total;
}

// Maxima of all rows; every thread gets them all.
template <int kRows>
__device__ void max_rows(uint32_t (&v)[kRows], const Team& team, Parts<uint32_t, kRows>& parts,
                         uint32_t phase) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) parts.put(team, r, __reduce_max_sync(~0u, v[r]));
  parts.wait(team, phase);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    uint32_t peak = 0;
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < parts.slots(team); i += 32) {
      peak = max(peak, parts.of_warp[r][i]);
    }
    v[r] = __reduce_max_sync(~0u, peak);
  }
}

}  // namespace
}  // namespace spense::cuda
