// SPDX-License-Identifier: Apache-2.0
// AVX-512 pieces of the GEMM: e4m3 to bf16 by table, 16 x 16 transposes, the epilogue of 16 columns
// of y. Internal linkage: only files built for AVX-512 include this.
#pragma once

#include <immintrin.h>

#include "cpu/gemm_common.h"

namespace spense::cpu {
namespace {

// A table rather than shifts, because e4m3 subnormals are normal in bf16 and vdpbf16ps flushes
// bf16 subnormals.
struct Bf16Tables {
  alignas(64) uint8_t low[128], high[128];  // bytes of the bf16 value of each magnitude
  constexpr Bf16Tables() : low(), high() {
    for (int byte = 0; byte < 128; ++byte) {
      const uint16_t value = bf16_from_float(e4m3_to_float(static_cast<uint8_t>(byte)));
      low[byte] = static_cast<uint8_t>(value & 0xFF);
      high[byte] = static_cast<uint8_t>(value >> 8);
    }
  }
};
constexpr Bf16Tables kBf16Tables;

// 64 e4m3 bytes as two vectors of 32 bf16 values. In 128-bit lane l, `first` holds bytes 16 l to
// 16 l + 7 and `second` bytes 16 l + 8 to 16 l + 15: "unpacked order". Dot products do not mind, as
// long as x and w agree.
struct Bf16Pair {
  __m512i first, second;
};

struct E4m3ToBf16 {
  __m512i low0 = _mm512_load_si512(kBf16Tables.low), low1 = _mm512_load_si512(kBf16Tables.low + 64);
  __m512i high0 = _mm512_load_si512(kBf16Tables.high),
          high1 = _mm512_load_si512(kBf16Tables.high + 64);
  __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));

  Bf16Pair operator()(__m512i bytes) const {
    const __m512i low = _mm512_permutex2var_epi8(low0, bytes, low1);
    const __m512i magnitude = _mm512_permutex2var_epi8(high0, bytes, high1);
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, bytes, sign, 0xF8);  // a | (b & c)
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
  }
};

__m512 dot(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

__m128i load128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// Bytes [begin, begin + 64) of a row of x, zeros behind k.
__m512i load_x(const uint8_t* row, int64_t begin, int64_t k) {
  const int64_t left = k - begin;
  if (left >= 64) return _mm512_loadu_si512(row + begin);
  if (left <= 0) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi8((__mmask64{1} << left) - 1, row + begin);
}

// row[i] element j -> row[j] element i, 32-bit elements.
void transpose16(__m512i row[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xDD);
    t[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    row[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xDD);
    row[i + 4] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    row[i + 12] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xDD);
  }
}

// Element i of the result is the sum of row[i].
__m512 sum_rows(const __m512 row[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; ++i) t[i] = _mm512_castps_si512(row[i]);
  transpose16(t);
  __m512 sum[8];
  for (int i = 0; i < 8; ++i) {
    sum[i] = _mm512_add_ps(_mm512_castsi512_ps(t[i]), _mm512_castsi512_ps(t[i + 8]));
  }
  for (int width = 4; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] = _mm512_add_ps(sum[i], sum[i + width]);
  }
  return sum[0];
}

// Columns n to n + count - 1 (at most 16) of a row of y.
struct ColumnScales {
  __m512 w_scale, bias;
  bool has_bias;
  __mmask16 mask;

  ColumnScales(const GemmArgs& args, int64_t n, int count)
      : has_bias(args.bias != nullptr), mask(static_cast<__mmask16>((1u << count) - 1)) {
    w_scale = _mm512_maskz_loadu_ps(mask, args.w_scale + n);
    bias = has_bias ? _mm512_maskz_loadu_ps(mask, args.bias + n) : _mm512_setzero_ps();
  }

  void store(const GemmArgs& args, int64_t m, int64_t n, __m512 acc, float scale) const {
    __m512 value = _mm512_mul_ps(_mm512_mul_ps(acc, _mm512_set1_ps(scale)), w_scale);
    if (has_bias) value = _mm512_add_ps(value, bias);
    const int64_t at = m * args.n + n;
    if (args.out == OutType::kFloat32) {
      _mm512_mask_storeu_ps(static_cast<float*>(args.y) + at, mask, value);
      return;
    }
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    __m256i half;
    if (args.out == OutType::kFloat16) {
      half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      half = _mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7E00));
    } else {
      // Not vcvtneps2bf16, which flushes subnormals.
      const __m512i bits = _mm512_castps_si512(value);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i rounded =
          _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
      half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
      half = _mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7FC0));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.y) + at, mask, half);
  }
};

// Whether any byte of a row of x is NaN, then the scale as in gemm_common.h.
float row_scale512(const GemmArgs& args, int64_t m) {
  const uint8_t* row = args.x + m * args.x_stride;
  const __m512i nan = _mm512_set1_epi8(kE4m3Nan);
  __mmask64 found = 0;
  for (int64_t k = 0; k < args.k; k += 64) {
    found |= _mm512_cmpeq_epi8_mask(_mm512_and_si512(load_x(row, k, args.k), nan), nan);
  }
  return found ? __builtin_nanf("") : args.x_scale[m * args.x_scale_step];
}

}  // namespace
}  // namespace spense::cpu
