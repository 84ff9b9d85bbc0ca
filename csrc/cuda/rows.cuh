// SPDX-License-Identifier: Apache-2.0
// What the kernels that quantise rows share: element types, and runs of 8 columns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "cuda/quantize.h"
#include "device/ptx.cuh"

namespace spense::cuda {
namespace {

constexpr int kMaxSmem = 216 * 1024;
constexpr int64_t kMaxGridRows = 65535;  // of grid.y
constexpr uint32_t kInfinityBits = 0x7F800000u;
constexpr uint32_t kNanBits = 0x7FC00000u;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ inline uint32_t pair_bits(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t pair_bits(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 8 neighbouring elements. As words, because the compiler would give each half a register.
template <typename T>
struct alignas(16) Eight {
  static constexpr int kWords = 2 * static_cast<int>(sizeof(T));
  uint32_t words[kWords];

  __device__ float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    } else {
      const auto bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
      return to_float(*reinterpret_cast<const T*>(&bits));
    }
  }
  // Elements i and i + 1, i even, rounded to T.
  __device__ void set_pair(int i, float low, float high) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(low), words[i + 1] = __float_as_uint(high);
    } else {
      words[i / 2] = pair_bits(low, high, T{});
    }
  }
  // Moves all elements down by one and puts the one at `from` (zero for null) behind them.
  __device__ void push(const T* from) {
    constexpr int kShift = 8 * static_cast<int>(sizeof(T)) % 32;
    uint32_t last = 0;
    if (from) {
      if constexpr (sizeof(T) == 4) {
        last = *reinterpret_cast<const uint32_t*>(from);
      } else {
        last = *reinterpret_cast<const uint16_t*>(from);
      }
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t next = i + 1 < kWords ? words[i + 1] : last;
      words[i] = kShift ? words[i] >> kShift | next << kShift : next;
    }
  }
};

// Whether other CTAs read the same, which no kernel before writes; kUnknown says neither.
enum class Reuse { kNever, kOthers, kUnknown };

// The first `left` of 8 elements, zero for the others. kRegular: all or none, and aligned.
template <Reuse kReuse, bool kRegular, typename T>
__device__ Eight<T> load_columns(const T* from, int left) {
  Eight<T> v = {};
  if constexpr (kRegular) {
    if (left > 0) {
#pragma unroll
      for (int i = 0; i < Eight<T>::kWords / 4; ++i) {
        const auto* words = reinterpret_cast<const uint4*>(from) + i;
        const uint4 four = kReuse == Reuse::kNever    ? __ldcs(words)
                           : kReuse == Reuse::kOthers ? __ldg(words)
                                                      : *words;
        v.words[4 * i] = four.x, v.words[4 * i + 1] = four.y;
        v.words[4 * i + 2] = four.z, v.words[4 * i + 3] = four.w;
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) v.push(i < left ? from + i : nullptr);
  }
  return v;
}

// Stores the first `left` of 8 elements.
template <bool kRegular, typename T>
__device__ void store_columns(T* to, Eight<T> v, int left) {
  if constexpr (kRegular) {
    if (left > 0) *reinterpret_cast<Eight<T>*>(to) = v;
  } else {
#pragma unroll 1
    for (int i = 0; i < left && i < 8; ++i) {
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<uint32_t*>(to + i) = v.words[0];
      } else {
        *reinterpret_cast<uint16_t*>(to + i) = static_cast<uint16_t>(v.words[0]);
      }
      v.push(nullptr);
    }
  }
}

// Makes the compiler compute v here, not where it is used.
template <typename T>
__device__ void finish(Eight<T>& v) {
#pragma unroll
  for (uint32_t& word : v.words) ptx::pin(word);
}

template <typename T>
bool aligned_rows(const void* base, int64_t stride) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * sizeof(T) % 16 == 0;
}

// Calls run.operator()<T>() with the type of the elements.
template <typename Run>
void with_type(InType type, Run run) {
  switch (type) {
    case InType::kBFloat16:
      return run.template operator()<__nv_bfloat16>();
    case InType::kFloat16:
      return run.template operator()<__half>();
    case InType::kFloat32:
      return run.template operator()<float>();
  }
}

}  // namespace
}  // namespace spense::cuda
