// SPDX-License-Identifier: Apache-2.0
// Quantised bytes of one to four rows: in shared memory those of a column beside each other, from
// where they are gathered and stored to y.
#pragma once

#include <cuda_fp8.h>

#include "cuda/rows.cuh"
#include "device/ptx.cuh"

namespace spense::cuda {
namespace {

constexpr int kColumns = 8;  // neighbouring columns of a thread

// Places of 8 columns in shared memory.
struct WidePlaces {
  int at[kColumns];
};
// The same in 16 bits each.
struct Places {
  uint32_t pairs[kColumns / 2];

  __device__ void set(const WidePlaces& wide) {
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) pairs[i / 2] = wide.at[i] | wide.at[i + 1] << 16;
  }
  __device__ WidePlaces get() {
    WidePlaces wide;
#pragma unroll
    for (uint32_t& pair : pairs) ptx::pin(pair);  // unpack here, do not keep the result
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      wide.at[i] = pairs[i / 2] & 0xFFFF, wide.at[i + 1] = pairs[i / 2] >> 16;
    }
    return wide;
  }
};

// Where the bytes of a column lie. A thread writes 8 columns at once, for 4 rows two 16-byte slots;
// exchanging them in every other run of lanes spreads a warp's over all banks.
template <int kRows>
__device__ int place_of(int column) {
  if constexpr (kRows < 4) return column * kRows;
  return ((column / 4) ^ (column / 32 & 1)) * 16 + column % 4 * 4;
}

// Where output columns c to c + 8 come from.
template <int kRows, bool kRegular>
__device__ WidePlaces read_gather(const QuantizeArgs& p, int c) {
  const int k = static_cast<int>(p.k);
  const auto columns = load_columns<Reuse::kOthers, kRegular>(p.gather + c, k - c);
  WidePlaces wide;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const uint32_t column = columns.words[i];
    wide.at[i] = place_of<kRows>(column < static_cast<uint32_t>(k) ? static_cast<int>(column) : 0);
  }
  return wide;
}

// Of a row with this largest |v|. NaN where that is not finite, and a NaN as factor makes all bytes
// 0x7F.
__device__ inline float scale_of(float peak) {
  if (!(peak < __uint_as_float(kInfinityBits))) return __uint_as_float(kNanBits);
  return fmaxf(peak, 1e-12f) * (1.0f / 448.0f);
}

__device__ inline uint32_t fp8_pair(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

struct alignas(8) Bytes8 {
  uint32_t low, high;
};

// 8 columns of a row of y; those from `left` on are zero.
template <bool kRegular>
__device__ void store_bytes(uint8_t* to, int left, Bytes8 bytes) {
  if (left < kColumns) {
    if (kRegular || left <= 0) {
      bytes = {0, 0};
    } else {
      bytes.low &= left >= 4 ? ~0u : ~0u >> (32 - 8 * left);
      bytes.high &= left > 4 ? ~0u >> (64 - 8 * left) : 0u;
    }
  }
  *reinterpret_cast<Bytes8*>(to) = bytes;
}

// Byte r of w[0..3].
__device__ inline void transpose_bytes(const uint32_t* w, uint32_t (&rows)[4]) {
  const uint32_t a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
  const uint32_t c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
  rows[0] = __byte_perm(a, b, 0x5410);
  rows[1] = __byte_perm(a, b, 0x7632);
  rows[2] = __byte_perm(c, d, 0x5410);
  rows[3] = __byte_perm(c, d, 0x7632);
}

// Columns at the given places, of all rows.
template <int kRows>
__device__ void gather_bytes(const unsigned char* memory, const WidePlaces& places,
                             Bytes8 (&rows)[kRows]) {
  uint32_t w[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const unsigned char* at = memory + places.at[i];
    if constexpr (kRows == 1) {
      w[i] = *at;
    } else if constexpr (kRows == 2) {
      w[i] = *reinterpret_cast<const uint16_t*>(at);
    } else {
      w[i] = *reinterpret_cast<const uint32_t*>(at);
    }
  }
  if constexpr (kRows == 1) {
    rows[0].low = __byte_perm(w[0] | w[1] << 8, w[2] | w[3] << 8, 0x5410);
    rows[0].high = __byte_perm(w[4] | w[5] << 8, w[6] | w[7] << 8, 0x5410);
  } else if constexpr (kRows == 2) {
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) w[i] |= w[i + 1] << 16;
    rows[0] = {__byte_perm(w[0], w[2], 0x6420), __byte_perm(w[4], w[6], 0x6420)};
    rows[1] = {__byte_perm(w[0], w[2], 0x7531), __byte_perm(w[4], w[6], 0x7531)};
  } else {
    uint32_t low[4], high[4];
    transpose_bytes(w, low);
    transpose_bytes(w + 4, high);
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = {low[r], high[r]};
  }
}

}  // namespace
}  // namespace spense::cuda
