// SPDX-License-Identifier: Apache-2.0
// What happens to the sums of a segment: tiles that were cut along K are put together, then
//
//   y[m, n] = (sum * x_scale[m]) * w_scale[n] + bias[n]
//
// each step in float32, one rounding to the output type at the end.
//
// Four warps, each 32 rows of the CTA's tile: a thread holds one row, kChunk tokens at a time. A
// store of a warp is 32 neighbouring elements of one token: whole 32-byte sectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sm100/loaders.cuh"

namespace spense::sm100 {

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

template <class T>
class Epilogue {
 public:
  __device__ Epilogue(const Params& p, uint32_t smem, uint32_t tmem, int cluster, int rank,
                      int warp)
      : p_(p), smem_(smem), cluster_(cluster), rank_(rank), warp_(warp) {
    tmem_ = tmem + (static_cast<uint32_t>(32 * warp) << 16);
    scales_ = smem + T::kScales + 4 * T::kTokens * warp;
  }

  // One segment: fetches the factors, waits for the sums, combines and stores them, and gives the
  // accumulator back.
  __device__ void run(const Job& job) {
    const int token0 = job.token_tile * T::kTokens;
    const int row = (job.row_tile + rank_) * kTileRows + 32 * warp_ + lane();
    __syncwarp();  // the scales of the segment before are read
    for (int i = lane(); i < T::kTokens; i += 32) {
      const int token = min(token0 + i, p_.m - 1);
      ptx::store_shared(scales_ + 4 * i,
                        __float_as_uint(__ldcg(p_.x_scale + token * p_.x_scale_step)));
    }
    const int known_row = min(row, p_.n - 1);
    const float w_scale = __ldg(p_.w_scale + known_row);
    const float bias = p_.bias ? __ldg(p_.bias + known_row) : 0.0f;
    __syncwarp();

    ptx::barrier_wait(smem_ + T::kSumsFull + 8 * sums_.slot, sums_.parity);
    __syncwarp();
    ptx::tmem_fence_after();
    if (job.first == job.last || collect(job)) {
      const auto to = [&]<typename Out>(Out* y) {
        for_chunks([&](int token, float (&v)[T::kChunk]) {
          if (job.first != job.last) add_parts(job, token, v);
          store(y, token0, token, row, w_scale, bias, v);
        });
      };
      switch (p_.out) {
        case OutType::kBFloat16:
          to(static_cast<__nv_bfloat16*>(p_.y));
          break;
        case OutType::kFloat16:
          to(static_cast<__half*>(p_.y));
          break;
        case OutType::kFloat32:
          to(static_cast<float*>(p_.y));
          break;
      }
    }
    ptx::tmem_fence_before();
    __syncwarp();
    if (lane() == 0) {
      const uint32_t empty = smem_ + T::kSumsEmpty + 8 * sums_.slot;
      if constexpr (T::kCtas > 1) {
        ptx::barrier_arrive_remote(empty, rank_ & ~1);
      } else {
        ptx::barrier_arrive(empty);
      }
    }
    sums_.advance();
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }

  // The sums of this thread's row, kChunk tokens from `token` on.
  template <class Use>
  __device__ __forceinline__ void for_chunks(Use use) const {
#pragma unroll 1
    for (int token = 0; token < T::kTokens; token += T::kChunk) {
      float v[T::kChunk];
      __syncwarp();
      ptx::tmem_load(v, tmem_ + sums_.slot * T::kTokens + token);
      use(token, v);
    }
  }

  // --- tiles that several clusters share. Nobody waits for anybody: each writes its part, and the
  // last to arrive adds them in the order of K, so that the result does not depend on who that is.
  // Each warp has its own counter.

  // Whether this warp finishes the tile.
  __device__ bool collect(const Job& job) const {
    const uint32_t others = static_cast<uint32_t>(job.last - job.first);
    uint32_t* counter = p_.counters +
                        (job.first * T::kClusterSize + rank_) * heuristics::sm100::kEpilogueWarps +
                        warp_;
    uint32_t arrived = lane() == 0 ? ptx::load_relaxed(counter) : 0;
    if (__shfl_sync(~0u, arrived, 0) == others) {
      if (lane() == 0) ptx::store_relaxed(counter, 0);
      ptx::fence_gpu();
      return true;
    }
    float* part = place(cluster_, job.step_begin == 0);
    for_chunks([&](int token, float (&v)[T::kChunk]) {
#pragma unroll
      for (int i = 0; i < T::kChunk; ++i) __stcg(part + (token + i) * kTileRows, v[i]);
    });
    __syncwarp();
    // Ordered after every store of the warp. Back to 0 after the last.
    arrived = lane() == 0 ? ptx::atomic_ticket(counter, others) : 0;
    if (__shfl_sync(~0u, arrived, 0) != others) return false;
    ptx::fence_gpu();
    return true;
  }

  // This thread's row of the part that a cluster has written, token by token kTileRows apart.
  __device__ float* place(int cluster, bool holds_step_zero) const {
    const int slot = heuristics::partial_slot(cluster, holds_step_zero) * T::kClusterSize + rank_;
    return p_.partials + static_cast<int64_t>(slot) * (T::kTokens * kTileRows) + 32 * warp_ +
           lane();
  }

  // v = the sum of all parts; this CTA's own is in v.
  __device__ __forceinline__ void add_parts(const Job& job, int token,
                                            float (&v)[T::kChunk]) const {
    float sum[T::kChunk];
#pragma unroll
    for (int i = 0; i < T::kChunk; ++i) sum[i] = 0;
#pragma unroll 1
    for (int c = job.first; c <= job.last; ++c) {
      const float* part = place(c, c == job.first) + token * kTileRows;
#pragma unroll
      for (int i = 0; i < T::kChunk; ++i) {
        sum[i] = __fadd_rn(sum[i], c == cluster_ ? v[i] : __ldcg(part + i * kTileRows));
      }
    }
#pragma unroll
    for (int i = 0; i < T::kChunk; ++i) v[i] = sum[i];
  }

  template <typename Out>
  __device__ __forceinline__ void store(Out* y, int token0, int token, int row, float w_scale,
                                        float bias, const float (&v)[T::kChunk]) const {
    if (row >= p_.n) return;
    Out* to = y + static_cast<int64_t>(token0 + token) * p_.n + row;
#pragma unroll
    for (int i = 0; i < T::kChunk; ++i) {
      if (token0 + token + i >= p_.m) break;
      const float x_scale = __uint_as_float(ptx::load_shared(scales_ + 4 * (token + i)));
      float sum = __fmul_rn(__fmul_rn(v[i], x_scale), w_scale);
      if (p_.bias) sum = __fadd_rn(sum, bias);
      *to = convert<Out>(sum);
      to += p_.n;
    }
  }

  const Params& p_;
  uint32_t smem_, tmem_, scales_;
  int cluster_, rank_, warp_;
  Cursor<T::kAccumulators> sums_;
};

}  // namespace spense::sm100
