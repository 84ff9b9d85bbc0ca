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

  // By all threads, and a barrier after it.
  __device__ void init() {
    for (int i = threadIdx.x; i < kRows * kSlots; i += blockDim.x) of_warp[0][i] = {};
    if (threadIdx.x == 0) ptx::barrier_init(ptx::smem_address(&arrived), 1);
  }

  // A warp's part of a row. `first`: whether this lane is the one to pass it on in a CTA; in a
  // cluster lane i passes it to CTA i.
  __device__ void put(const Team& team, int row, bool first, V v) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (kRows > 1 || team.size == 1) {
      if (first) of_warp[row][warp] = v;
      return;
    }
    const uint32_t barrier = ptx::smem_address(&arrived);
    const uint32_t to = ptx::smem_address(&of_warp[0][team.rank * kMaxWarps + warp]);
    if (threadIdx.x == 0) {
      const uint32_t warps = team.size * (blockDim.x / 32);
      ptx::barrier_arrive_expect(barrier, warps * static_cast<uint32_t>(sizeof(V)));
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

  // Combines the parts of row lane / (32 / kRows) that this lane has to; its neighbours do the
  // rest.
  template <typename Combine>
  __device__ V collect(const Team& team, Combine combine) const {
    constexpr int kLanes = 32 / kRows;
    const int lane = threadIdx.x % 32;
    const V* parts = of_warp[lane / kLanes] + lane % kLanes;
    V all = parts[0];  // zero where there is no such warp
#pragma unroll
    for (int i = 1; i < kRows; ++i) all = combine(all, parts[i * kLanes]);
    if constexpr (kRows == 1) {
      for (uint32_t cta = 1; cta < team.size; ++cta) all = combine(all, parts[cta * kMaxWarps]);
    }
    return all;
  }
};

// Every lane gets the combination over the lanes of its row.
template <int kRows, typename V, typename Combine>
__device__ V combine_lanes(V v, Combine combine) {
#pragma unroll
  for (int step = 16 / kRows; step > 0; step /= 2) {
    v = combine(v, __shfl_xor_sync(~0u, v, step));
  }
  return v;
}

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
  const auto add = [](double a, double b) { return a + b; };
  parts.put(team, lane / kLanes, lane % kLanes == 0, combine_lanes<kRows>(v[0], add));
  parts.wait(team, phase);
  return combine_lanes<kRows>(parts.collect(team, add), add);
}

// Maxima of all rows, to lanes as above.
template <int kRows>
__device__ uint32_t max_rows(const uint32_t (&v)[kRows], const Team& team,
                             Parts<uint32_t, kRows>& parts, uint32_t phase) {
  const auto larger = [](uint32_t a, uint32_t b) { return max(a, b); };
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    parts.put(team, r, threadIdx.x % 32 == 0, __reduce_max_sync(~0u, v[r]));
  }
  parts.wait(team, phase);
  const uint32_t peak = parts.collect(team, larger);
  if constexpr (kRows == 1) return __reduce_max_sync(~0u, peak);
  return combine_lanes<kRows>(peak, larger);
}

// v of all rows, from lanes as above.
template <int kRows>
__device__ void spread_rows(float v, float (&rows)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r] = kRows == 1 ? v : __shfl_sync(~0u, v, r * (32 / kRows));
}

}  // namespace
}  // namespace spense::cuda
