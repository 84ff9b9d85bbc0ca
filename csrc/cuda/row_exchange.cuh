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

  __device__ void barrier() const {
    if (size == 1) {
      __syncthreads();
    } else {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }
};

// Parts of kRows rows; only the threads of a single row span a cluster.
template <typename V, int kRows>
struct Parts {
  static constexpr int kSlots = kRows == 1 ? kMaxCluster * kMaxWarps : kMaxWarps;
  V of_warp[kRows][kSlots];

  // Lane i of a warp passes v on to CTA i where the row has several, lane 0 in the CTA otherwise.
  __device__ void put(const Team& team, V v) {
    static_assert(kRows == 1);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    V* place = &of_warp[0][team.rank * (blockDim.x / 32) + warp];
    if (team.size == 1) {
      if (lane == 0) *place = v;
    } else if (lane < team.size) {
      ptx::store_remote(ptx::remote_address(ptx::smem_address(place), lane), v);
    }
  }
};

// Sums of all rows. A lane gets that of row lane / (32 / kRows).
template <int kRows>
__device__ double sum_rows(double (&v)[kRows], const Team& team, Parts<double, kRows>& parts) {
  constexpr int kLanes = 32 / kRows;  // of a row
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
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
    parts.put(team, v[0]);
  } else {
    if (lane % kLanes == 0) parts.of_warp[row][warp] = v[0];
  }
  team.barrier();
  double total = 0.0;
  const int slots = kRows == 1 ? warps * static_cast<int>(team.size) : warps;
  for (int i = lane % kLanes; i < slots; i += kLanes) total += parts.of_warp[row][i];
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  return total;
}

// Maxima of all rows; every thread gets them all.
template <int kRows>
__device__ void max_rows(uint32_t (&v)[kRows], const Team& team, Parts<uint32_t, kRows>& parts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    v[r] = __reduce_max_sync(~0u, v[r]);
    if constexpr (kRows == 1) {
      parts.put(team, v[r]);
    } else {
      if (lane == 0) parts.of_warp[r][warp] = v[r];
    }
  }
  team.barrier();
  const int slots = kRows == 1 ? warps * static_cast<int>(team.size) : warps;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    uint32_t peak = 0;
    for (int i = lane; i < slots; i += 32) peak = max(peak, parts.of_warp[r][i]);
    v[r] = __reduce_max_sync(~0u, peak);
  }
}

}  // namespace
}  // namespace spense::cuda
