// SPDX-License-Identifier: Apache-2.0
// Sum and maximum over the threads of one or several rows: a CTA, or a cluster of CTAs that share
// the columns of one row. Every warp tells its part to all CTAs, then one barrier, then every warp
// combines all parts, in the same order everywhere.
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

// Of columns of a row: sum of squares, bits of the largest magnitude.
struct Found {
  double squares;
  uint32_t peak;
};

__device__ inline void raise_floats(uint32_t& peak, const Eight<float>& v) {
  float largest = __uint_as_float(peak);
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = ptx::larger_magnitude(largest, v.get(i));
  peak = __float_as_uint(largest);
}

// What warps found in kRows rows; only the threads of a single row span a cluster. Other CTAs'
// parts come as asynchronous stores that an mbarrier counts: a cluster barrier that orders plain
// stores costs a fence of all memory.
template <int kRows, bool kSums, int kWarps = kMaxWarps>
struct Parts {
  static_assert(kRows == 1 || kWarps == kMaxWarps);
  static constexpr int kSlots = kRows == 1 ? kMaxCluster * kWarps : kMaxWarps;
  static constexpr int kSumSlots = kSums ? kRows * kSlots : 1;
  double squares[kSumSlots];
  uint32_t peaks[kRows * kSlots];
  uint64_t arrived;

  // By all threads, and a barrier after it.
  __device__ void init() {
    for (int i = threadIdx.x; i < kSumSlots; i += blockDim.x) squares[i] = 0.0;
    for (int i = threadIdx.x; i < kRows * kSlots; i += blockDim.x) peaks[i] = 0;
    if (threadIdx.x == 0) ptx::barrier_init(ptx::smem_address(&arrived), 1);
  }

  // A warp's part of row lane / (32 / kRows). In a cluster lane i passes it to CTA i.
  __device__ void put(const Team& team, const Found& found) {
    constexpr int kLanes = 32 / kRows;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (kRows > 1 || team.size == 1) {
      if (lane % kLanes != 0) return;
      if constexpr (kSums) squares[lane / kLanes * kSlots + warp] = found.squares;
      peaks[lane / kLanes * kSlots + warp] = found.peak;
      return;
    }
    const uint32_t slot = team.rank * kWarps + warp, barrier = ptx::smem_address(&arrived);
    if (threadIdx.x == 0) {
      constexpr uint32_t kBytes = sizeof(uint32_t) + (kSums ? sizeof(double) : 0);
      ptx::barrier_arrive_expect(barrier, team.size * (blockDim.x / 32) * kBytes);
    }
    if (lane < team.size) {
      const uint32_t there = ptx::remote_address(barrier, lane);
      if constexpr (kSums) {
        const uint32_t to = ptx::smem_address(&squares[slot]);
        ptx::store_async(ptx::remote_address(to, lane), found.squares, there);
      }
      const uint32_t to = ptx::smem_address(&peaks[slot]);
      ptx::store_async(ptx::remote_address(to, lane), found.peak, there);
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
  __device__ Found collect(const Team& team) const {
    constexpr int kLanes = 32 / kRows;
    constexpr int kCount = kRows == 1 ? kMaxCluster : kRows;
    constexpr int kStep = kRows == 1 ? kWarps : kLanes;
    const int lane = threadIdx.x % 32, first = lane / kLanes * kSlots + lane % kLanes;
    Found all = {};
    if (kRows == 1 && lane >= kWarps) return all;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {  // zero where there is no such warp
      if (kRows == 1 && i == 1 && team.size == 1) break;
      if constexpr (kSums) all.squares += squares[first + i * kStep];
      all.peak = max(all.peak, peaks[first + i * kStep]);
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
template <int kRows>
__device__ double add_lanes(double v) {
  return combine_lanes<kRows>(v, [](double a, double b) { return a + b; });
}

// Sums over a warp, of row lane / (32 / kRows).
template <int kRows>
__device__ double add_rows(const Found (&found)[kRows]) {
  double v[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) v[r] = found[r].squares;
  // Halves of the warp exchange rows, so that the shuffles are hardly more than for one row.
#pragma unroll
  for (int rows = kRows, step = 16; rows > 1; rows /= 2, step /= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < rows / 2; ++i) {
      const double kept = upper ? v[i + rows / 2] : v[i];
      const double given = upper ? v[i] : v[i + rows / 2];
      v[i] = kept + __shfl_xor_sync(~0u, given, step);
    }
  }
  return add_lanes<kRows>(v[0]);
}

// What all threads found in row lane / (32 / kRows).
template <int kRows, bool kSums, int kWarps>
__device__ Found exchange(const Found (&found)[kRows], const Team& team,
                          Parts<kRows, kSums, kWarps>& parts, uint32_t phase) {
  Found mine = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const uint32_t peak = __reduce_max_sync(~0u, found[r].peak);
    if (r == 0 || threadIdx.x % 32 / (32 / kRows) == static_cast<unsigned>(r)) mine.peak = peak;
  }
  if constexpr (kSums) mine.squares = add_rows(found);
  parts.put(team, mine);
  parts.wait(team, phase);
  Found all = parts.collect(team);
  if constexpr (kSums) all.squares = add_lanes<kRows>(all.squares);
  if constexpr (kRows == 1) {
    all.peak = __reduce_max_sync(~0u, all.peak);
  } else {
    all.peak = combine_lanes<kRows>(all.peak, [](uint32_t x, uint32_t y) { return max(x, y); });
  }
  return all;
}

// v of all rows, from lanes as above.
template <int kRows>
__device__ void spread_rows(float v, float (&rows)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r] = kRows == 1 ? v : __shfl_sync(~0u, v, r * (32 / kRows));
}

}  // namespace
}  // namespace spense::cuda
