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

// Puts the segments of a tile together that several clusters hold. Nobody waits for anybody: each
// writes its sums, and the last to arrive adds all of them in the order of K, so that the result
// does not depend on who that is. Works by warpgroup.
template <class T>
class Combiner {
 public:
  using Sums = float (&)[T::kParts][T::kSums];

  __device__ Combiner(const Params& p, uint32_t smem, int cluster, int rank, int warpgroup)
      : p_(p),
        ticket_(smem + T::kTickets + 4 * warpgroup),
        cluster_(cluster),
        rank_(rank),
        warpgroup_(warpgroup) {}

  // Whether the warpgroup holds the finished sums now.
  __device__ bool combine(const Job& job, Sums sums) const {
    const int others = job.last - job.first;
    uint32_t* counter = p_.counters + (job.first * T::kCluster + rank_) * 2 + warpgroup_;
    // Where the sums are just two, or these come first, they may stay in registers.
    const bool may_keep = others == 1 || cluster_ == job.first;
    if (may_keep && share([&] { return ptx::load_relaxed(counter); }) == others) {
      if (thread() == 0) ptx::store_relaxed(counter, 0);
      ptx::fence_gpu();
      for (int c = job.first; c <= job.last; ++c) {
        if (c != cluster_) add(place(c, c == job.first), sums);
      }
      return true;
    }
    store(place(cluster_, job.x_begin == 0), sums);
    ptx::named_barrier_sync(1 + warpgroup_, 128);
    // Ordered after every store of the warpgroup by the barrier. Back to 0 after the last.
    if (share([&] { return ptx::atomic_ticket(counter, others); }) != others) return false;
    ptx::fence_gpu();
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < T::kSums; ++i) sums[part][i] = 0;
    }
    for (int c = job.first; c <= job.last; ++c) add(place(c, c == job.first), sums);
    return true;
  }

 private:
  static constexpr int kVectors = T::kParts * T::kSums / 4;  // of 4 sums, of a thread

  __device__ static int thread() { return threadIdx.x % 128; }

  // What thread 0 finds, told to the warpgroup.
  template <class Find>
  __device__ int share(Find find) const {
    if (thread() == 0) ptx::store_shared(ticket_, find());
    ptx::named_barrier_sync(1 + warpgroup_, 128);
    const uint32_t found = ptx::load_shared(ticket_);
    ptx::named_barrier_sync(1 + warpgroup_, 128);
    return static_cast<int>(found);
  }
  __device__ float4* place(int cluster, bool holds_step_zero) const {
    const int slot = heuristics::partial_slot(cluster, holds_step_zero) * T::kCluster + rank_;
    return reinterpret_cast<float4*>(p_.partials) +
           static_cast<int64_t>(slot) * (kVectors * T::kConsumerThreads) + warpgroup_ * 128 +
           thread();
  }
  __device__ static void store(float4* to, Sums sums) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float* v = &sums[i / (T::kSums / 4)][i % (T::kSums / 4) * 4];
      __stcg(to + i * T::kConsumerThreads, make_float4(v[0], v[1], v[2], v[3]));
    }
  }
  __device__ static void add(const float4* from, Sums sums) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float4 v = __ldcg(from + i * T::kConsumerThreads);
      float* to = &sums[i / (T::kSums / 4)][i % (T::kSums / 4) * 4];
      to[0] += v.x;
      to[1] += v.y;
      to[2] += v.z;
      to[3] += v.w;
    }
  }

  const Params& p_;
  uint32_t ticket_;
  int cluster_, rank_, warpgroup_;
};

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

// Scales 64 rows of sums of one warpgroup and writes them. The factors are fetched when it is made,
// so that they are there when the sums are.
template <class T>
class Writer {
 public:
  // token0: first token of the tile; row0: first of the 16 rows of this warp.
  __device__ void start(const Params& p, int token0, int row0) {
    p_ = &p;
    token0_ = token0;
    row0_ = row0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(row0 + lane() / 4 + 8 * h, p.n - 1);
      w_scale_[h] = __ldg(p.w_scale + row);
      bias_[h] = p.bias ? __ldg(p.bias + row) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kScaleRegisters; ++i) {
      const int token = min(token0 + lane() + 32 * i, p.m - 1);
      x_scale_[i] = __ldcg(p.x_scale + token * p.x_scale_step);
    }
  }

  __device__ void store(float (&sums)[T::kSums]) const {
    scale(sums);
    switch (p_->out) {
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
  static constexpr int kScaleRegisters = (T::kTokens + 31) / 32;  // lane l holds tokens l + 32 i

  __device__ static int lane() { return threadIdx.x % 32; }

  __device__ __forceinline__ void scale(float (&sums)[T::kSums]) const {
#pragma unroll
    for (int j = 0; j < T::kTokens / 8; ++j) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int from = j % 4 * 8 + lane() % 4 * 2 + t;
        const float x_scale = __shfl_sync(~0u, x_scale_[j / 4], from);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& v = sums[4 * j + 2 * h + t];
          v = __fmul_rn(__fmul_rn(v, x_scale), w_scale_[h]);
          if (p_->bias) v = __fadd_rn(v, bias_[h]);
        }
      }
    }
  }

  // Two groups of 8 tokens x 16 rows at a time; each lane ends up with 8 rows of one token, so
  // that a warp's store fills whole 32-byte sectors.
  template <typename Out>
  __device__ __forceinline__ void store_16bit(const float (&sums)[T::kSums]) const {
    if (!p_->wide_rows) {
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
      const int token = token0_ + 8 * group + lane() / 4, row = row0_ + quad_lane % 2 * 8;
      if (group < kGroups && token < p_->m && row < p_->n) {
        Out* y = static_cast<Out*>(p_->y) + static_cast<int64_t>(token) * p_->n + row;
        *reinterpret_cast<uint4*>(y) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }

  template <typename Out>
  __device__ __forceinline__ void store_each(const float (&sums)[T::kSums]) const {
#pragma unroll
    for (int i = 0; i < T::kSums; ++i) {
      const int token = token0_ + i / 4 * 8 + lane() % 4 * 2 + i % 2;
      const int row = row0_ + lane() / 4 + i / 2 % 2 * 8;
      if (token < p_->m && row < p_->n) {
        static_cast<Out*>(p_->y)[static_cast<int64_t>(token) * p_->n + row] = convert<Out>(sums[i]);
      }
    }
  }

  const Params* p_;
  int token0_, row0_;
  float w_scale_[2], bias_[2], x_scale_[kScaleRegisters];
};

}  // namespace spense::sm90
