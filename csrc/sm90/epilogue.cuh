// SPDX-License-Identifier: Apache-2.0
// What happens to the sums of a segment: tiles that were cut along K are put together, then
//
//   y[m, n] = (sum * x_scale[m]) * w_scale[n] + bias[n]
//
// each step in float32, one rounding to the output type at the end.
//
// Fragment: thread t of a warpgroup holds rows 16 * (t / 32) + t % 32 / 4 (+ 8) of its 64 and
// tokens 8 * j + t % 4 * 2 (+ 1): sums[4 j + 2 * (row + 8 ?) + (token + 1 ?)].
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/ptx.cuh"
#include "sm90/traits.cuh"

namespace spense::sm90 {

// Adds up the segments of a tile that several clusters share. Nobody waits for anybody: each
// writes its sums, and the last to arrive reads all of them in the order of K, so that the result
// does not depend on who that is. Returns whether this warpgroup holds the finished sums.
template <class T>
__device__ bool combine(const Params& p, const Job& job, int cluster, int rank, int warpgroup,
                        uint32_t ticket_address, float (&sums)[T::kSums]) {
  const int thread = threadIdx.x % 128;
  const auto place = [&](int of_cluster, bool holds_step_zero) {
    const int slot = heuristics::partial_slot(of_cluster, holds_step_zero) * T::kCluster + rank;
    return reinterpret_cast<float4*>(p.partials) +
           static_cast<int64_t>(slot) * (kTileRows * T::kTokens / 4) + warpgroup * 128 + thread;
  };
  float4* mine = place(cluster, job.x_begin == 0);
#pragma unroll
  for (int i = 0; i < T::kSums / 4; ++i) {
    __stcg(mine + i * T::kConsumerThreads, make_float4(sums[4 * i], sums[4 * i + 1],
                                                       sums[4 * i + 2], sums[4 * i + 3]));
  }
  ptx::named_barrier_sync(1 + warpgroup, 128);
  if (thread == 0) {
    __threadfence();  // with the barrier, after every store of the warpgroup
    uint32_t* counter = p.counters + (job.first * T::kCluster + rank) * 2 + warpgroup;
    const uint32_t ticket = atomicInc(counter, job.last - job.first);  // back to 0 after the last
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(ticket_address), "r"(ticket) : "memory");
  }
  ptx::named_barrier_sync(1 + warpgroup, 128);
  uint32_t ticket;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(ticket) : "r"(ticket_address) : "memory");
  if (static_cast<int>(ticket) != job.last - job.first) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < T::kSums; ++i) sums[i] = 0;
  for (int c = job.first; c <= job.last; ++c) {
    const float4* part = place(c, c == job.first);
#pragma unroll
    for (int i = 0; i < T::kSums / 4; ++i) {
      const float4 v = __ldcg(part + i * T::kConsumerThreads);
      sums[4 * i] += v.x;
      sums[4 * i + 1] += v.y;
      sums[4 * i + 2] += v.z;
      sums[4 * i + 3] += v.w;
    }
  }
  return true;
}

template <typename Out>
__device__ Out convert(float v);
template <>
__device__ __forceinline__ float convert<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half convert<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 convert<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <typename Out>
__device__ __forceinline__ uint32_t convert_pair(float low, float high) {
  if constexpr (std::is_same_v<Out, __half>) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}

// Transposes a 4x4 matrix over four neighbouring lanes: lane i holds row i, then column i.
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4]) {
  const uint32_t lane = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      if (a & distance) continue;
      const int b = a + distance;
      const uint32_t sent = upper ? v[a] : v[b];
      const uint32_t got = __shfl_xor_sync(~0u, sent, distance);
      (upper ? v[a] : v[b]) = got;
    }
  }
}

// Scales the sums of one warpgroup and writes them.
template <class T>
struct Writer {
  const Params& p;
  int token0, row0;  // of this thread's warp: first token of the tile, first of 16 rows

  __device__ void store(float (&sums)[T::kSums]) const {
    scale(sums);
    switch (p.out) {
      case OutType::kBFloat16:
        store_16bit<__nv_bfloat16>(sums);
        break;
      case OutType::kFloat16:
        store_16bit<__half>(sums);
        break;
      case OutType::kFloat32:
        store_each<float>(sums);
        break;
    }
  }

 private:
  __device__ int lane() const { return threadIdx.x % 32; }

  __device__ __forceinline__ void scale(float (&sums)[T::kSums]) const {
    float w_scale[2], bias[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(row0 + lane() / 4 + 8 * h, p.n - 1);
      w_scale[h] = __ldg(p.w_scale + row);
      bias[h] = p.bias ? __ldg(p.bias + row) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < T::kTokens / 8; ++j) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int token = min(token0 + 8 * j + lane() % 4 * 2 + t, p.m - 1);
        const float x_scale = p.x_scale[token * p.x_scale_step];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& v = sums[4 * j + 2 * h + t];
          v = __fmul_rn(__fmul_rn(v, x_scale), w_scale[h]);
          if (p.bias) v = __fadd_rn(v, bias[h]);
        }
      }
    }
  }

  // Two groups of 8 tokens x 16 rows at a time; each lane ends up with 8 rows of one token, so
  // that a warp's store fills whole 32-byte sectors.
  template <typename Out>
  __device__ __forceinline__ void store_16bit(const float (&sums)[T::kSums]) const {
    if (!p.wide_rows) {
      store_each<Out>(sums);
      return;
    }
    constexpr int kGroups = T::kTokens / 8;
    const int quad_lane = lane() % 4;
#pragma unroll
    for (int j = 0; j < kGroups; j += 2) {
      uint32_t v[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int group = j + i / 2, half = i % 2;
        if (group < kGroups) {
          v[i] = ptx::transpose_8x8(
              convert_pair<Out>(sums[4 * group + 2 * half], sums[4 * group + 2 * half + 1]));
        }
      }
      transpose_quad(v);
      const int group = j + quad_lane / 2;
      const int token = token0 + 8 * group + lane() / 4, row = row0 + quad_lane % 2 * 8;
      if (group < kGroups && token < p.m && row < p.n) {
        Out* y = static_cast<Out*>(p.y) + static_cast<int64_t>(token) * p.n + row;
        *reinterpret_cast<uint4*>(y) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }

  template <typename Out>
  __device__ __forceinline__ void store_each(const float (&sums)[T::kSums]) const {
#pragma unroll
    for (int i = 0; i < T::kSums; ++i) {
      const int token = token0 + i / 4 * 8 + lane() % 4 * 2 + i % 2;
      const int row = row0 + lane() / 4 + i / 2 % 2 * 8;
      if (token < p.m && row < p.n) {
        static_cast<Out*>(p.y)[static_cast<int64_t>(token) * p.n + row] = convert<Out>(sums[i]);
      }
    }
  }
};

}  // namespace spense::sm90
