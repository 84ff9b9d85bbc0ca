// SPDX-License-Identifier: Apache-2.0
// What happens to the finished sums of a tile:
//
//   y[m, n] = (sum * x_scale[m]) * w_scale[n] + bias[n]
//
// each step in float32, one rounding to the output type at the end.
// Fragments are laid out as reduce.cuh says.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/ptx.cuh"
#include "sm90/traits.cuh"

namespace spense::sm90 {

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
  // Tokens [token0, token_end); row0: first of the 16 rows of this warp.
  __device__ void start(const Params& p, int warpgroup, int token0, int token_end, int row0) {
    barrier_ = 1 + warpgroup;
    p_ = &p;
    token0_ = token0;
    token_end_ = token_end;
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

  // staging: the warpgroup's, T::kPieces of kStagedBytes; `fresh`: with no stores of this warpgroup
  // under way that read them.
  __device__ void store(float (&sums)[T::kSums], uint32_t staging, bool fresh) const {
    scale(sums);
    if constexpr (T::kStaged) {
      if (p_->staged) {
        if (p_->out == OutType::kBFloat16) {
          store_staged<__nv_bfloat16>(sums, staging, fresh);
        } else {
          store_staged<__half>(sums, staging, fresh);
        }
        return;
      }
    }
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
      if (group < kGroups && token < token_end_ && row < p_->n) {
        Out* y = static_cast<Out*>(p_->y) + static_cast<int64_t>(token) * p_->n + row;
        *reinterpret_cast<uint4*>(y) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }

  // 64 rows x 32 tokens at a time go to shared memory, token by token, and from there to y.
  template <typename Out>
  __device__ __forceinline__ void store_staged(const float (&sums)[T::kSums], uint32_t staging,
                                               bool fresh) const {
    constexpr int kTokens = heuristics::kStagedTokens, kPieces = T::kPieces;
    const int thread = threadIdx.x % 128, warp = thread / 32;
    const int matrix = lane() / 8, column = lane() % 8;
#pragma unroll
    for (int begin = 0; begin < T::kTokens; begin += kTokens) {
      const int piece = begin / kTokens;
      const uint32_t buffer = staging + piece % kPieces * heuristics::kStagedBytes;
      // The piece before used the same buffer, and at first perhaps another tile's.
      if (piece >= kPieces || (piece == 0 && !fresh)) {
        if (thread == 0) {
          if (piece == 0) {
            ptx::store_wait_read<0>();
          } else {
            ptx::store_wait_read<kPieces - 1>();
          }
        }
        ptx::named_barrier_sync(barrier_, 128);
      }
#pragma unroll
      for (int j = 0; j < kTokens / 8 && begin + 8 * j < T::kTokens; j += 2) {
        const int at = (begin / 8 + j) * 4;
        const int token = 8 * (j + matrix / 2) + column, chunk = warp * 2 + matrix % 2;
        const uint32_t to = buffer + token * kRowBytes + ((chunk ^ column) * 16);
        const uint32_t a = convert_pair<Out>(sums[at], sums[at + 1]);
        const uint32_t b = convert_pair<Out>(sums[at + 2], sums[at + 3]);
        if (begin + 8 * (j + 1) < T::kTokens) {
          ptx::store_matrices(to, a, b, convert_pair<Out>(sums[at + 4], sums[at + 5]),
                              convert_pair<Out>(sums[at + 6], sums[at + 7]));
        } else {
          ptx::store_matrices(to, a, b);
        }
      }
      ptx::async_proxy_fence();
      ptx::named_barrier_sync(barrier_, 128);
      if (thread == 0) {
#pragma unroll
        for (int t = 0; t < kTokens && begin + t < T::kTokens; t += T::kStoreTokens) {
          if (token0_ + begin + t < token_end_) {
            ptx::tensor_store_2d(&p_->y_map, row0_ * 2, token0_ + begin + t,
                                 buffer + t * kRowBytes);
          }
        }
        ptx::store_commit();
      }
    }
  }

  template <typename Out>
  __device__ __forceinline__ void store_each(const float (&sums)[T::kSums]) const {
#pragma unroll
    for (int i = 0; i < T::kSums; ++i) {
      const int token = token0_ + i / 4 * 8 + lane() % 4 * 2 + i % 2;
      const int row = row0_ + lane() / 4 + i / 2 % 2 * 8;
      if (token < token_end_ && row < p_->n) {
        static_cast<Out*>(p_->y)[static_cast<int64_t>(token) * p_->n + row] = convert<Out>(sums[i]);
      }
    }
  }

  const Params* p_;
  uint32_t barrier_ = 0;
  int token0_, token_end_, row0_;
  float w_scale_[2], bias_[2], x_scale_[kScaleRegisters];
};

}  // namespace spense::sm90
