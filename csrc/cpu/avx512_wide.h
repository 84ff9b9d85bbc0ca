// SPDX-License-Identifier: Apache-2.0
// Many rows of x: an item decodes its rows of a unit to bf16 once and multiplies them with all rows
// of its m_block. Sixteen rows of x share a vector (a group), each pair of columns one 32-bit lane:
//
//   x in the workspace: [m / 16][padded k / 2][16][2] bf16, columns of each 64 in unpacked order
//   weights:            [row][columns of the unit] bf16, the same order, broadcast pair by pair
//
// so y accumulates transposed, [row][m], and the epilogue turns it round.
#pragma once

#include "cpu/avx512.h"

namespace spense::cpu {
namespace {

constexpr int kGroup = 16;         // rows of x in a vector
constexpr int kAccumulators = 16;  // weight rows times groups in the microkernel
constexpr int kPassColumns = 128;  // of a unit in one pass of the microkernel
constexpr int64_t kWideMBlock = 512;
constexpr int kWideRowBlock = kTileRows;

struct WideX {
  uint16_t* x;
  float* scale;
  int64_t group_stride;  // elements

  WideX(const GemmArgs& args, void* workspace)
      : x(static_cast<uint16_t*>(workspace)), group_stride(format::padded_k(args.k) * kGroup) {
    scale = reinterpret_cast<float*>(x + groups(args) * group_stride);
  }
  static int64_t groups(const GemmArgs& args) { return format::ceil_div(args.m, kGroup); }
  static size_t bytes(const GemmArgs& args) {
    return groups(args) * kGroup * (format::padded_k(args.k) * sizeof(uint16_t) + sizeof(float));
  }
};

void prepare_wide(const GemmArgs& args, const WideX& out, int64_t group) {
  const E4m3ToBf16 convert;
  const int64_t m0 = group * kGroup, rows = min64(kGroup, args.m - m0);
  uint16_t* to = out.x + group * out.group_stride;
  for (int64_t k = 0; k < format::padded_k(args.k); k += 64, to += 64 * kGroup) {
    __m512i first[kGroup], second[kGroup];
    for (int64_t i = 0; i < kGroup; ++i) {
      const uint8_t* row = args.x + (m0 + i) * args.x_stride;
      const Bf16Pair pair = convert(i < rows ? load_x(row, k, args.k) : _mm512_setzero_si512());
      first[i] = pair.first;
      second[i] = pair.second;
    }
    transpose16(first);
    transpose16(second);
    for (int i = 0; i < kGroup; ++i) {
      _mm512_storeu_si512(to + 32 * i, first[i]);
      _mm512_storeu_si512(to + 32 * (kGroup + i), second[i]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) out.scale[m0 + i] = row_scale512(args, m0 + i);
}

struct WideScratch {
  alignas(64) uint16_t weights[kWideRowBlock][kSparseUnitColumns];
  alignas(64) float acc[kWideRowBlock][kWideMBlock];
};

// Four bits for the kept places of a nibble.
struct ExpandMasks {
  alignas(16) uint8_t low[16], high[16];
  constexpr ExpandMasks() : low(), high() {
    for (int nibble = 0; nibble < 16; ++nibble) {
      low[nibble] = static_cast<uint8_t>((1 << (nibble & 3)) | (1 << (nibble >> 2)));
      high[nibble] = static_cast<uint8_t>(low[nibble] << 4);
    }
  }
};
constexpr ExpandMasks kExpandMasks;

__m128i load128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

void decode_sparse(const uint8_t* unit, int row, const E4m3ToBf16& convert, uint16_t* out) {
  const __m128i low_lut = load128(kExpandMasks.low), high_lut = load128(kExpandMasks.high);
  const __m128i nibble = _mm_set1_epi8(0xF);
  for (int k = 0; k < kSparseUnitColumns; k += 128) {
    const __m128i metadata = load128(unit + format::metadata_offset(row, k));
    const __m128i masks = _mm_or_si128(
        _mm_shuffle_epi8(low_lut, _mm_and_si128(metadata, nibble)),
        _mm_shuffle_epi8(high_lut, _mm_and_si128(_mm_srli_epi16(metadata, 4), nibble)));
    const uint64_t mask[2] = {static_cast<uint64_t>(_mm_cvtsi128_si64(masks)),
                              static_cast<uint64_t>(_mm_extract_epi64(masks, 1))};
    for (int i = 0; i < 2; ++i) {
      const int j = k / 2 + 32 * i;
      const __m256i kept = _mm256_inserti128_si256(
          _mm256_castsi128_si256(load128(unit + format::value_offset(row, j))),
          load128(unit + format::value_offset(row, j + 16)), 1);
      const Bf16Pair w = convert(_mm512_maskz_expand_epi8(mask[i], _mm512_castsi256_si512(kept)));
      _mm512_storeu_si512(out + k + 64 * i, w.first);
      _mm512_storeu_si512(out + k + 64 * i + 32, w.second);
    }
  }
}

void decode_dense(const uint8_t* unit, int row, const E4m3ToBf16& convert, uint16_t* out) {
  for (int k = 0; k < kDenseUnitColumns; k += 64) {
    __m512i bytes = _mm512_castsi128_si512(load128(unit + format::value_offset(row, k)));
    bytes = _mm512_inserti32x4(bytes, load128(unit + format::value_offset(row, k + 16)), 1);
    bytes = _mm512_inserti32x4(bytes, load128(unit + format::value_offset(row, k + 32)), 2);
    bytes = _mm512_inserti32x4(bytes, load128(unit + format::value_offset(row, k + 48)), 3);
    const Bf16Pair w = convert(bytes);
    _mm512_storeu_si512(out + k, w.first);
    _mm512_storeu_si512(out + k + 32, w.second);
  }
}

// acc[i][16 g ...] += weights[i] . x over kPassColumns columns, for kRows rows and kGroups groups.
template <int kRows, int kGroups>
void microkernel(const uint16_t* weights, const uint16_t* x, int64_t group_stride, float* acc) {
  __m512 sum[kRows][kGroups];
  for (int i = 0; i < kRows; ++i) {
    for (int g = 0; g < kGroups; ++g) {
      sum[i][g] = _mm512_load_ps(acc + i * kWideMBlock + g * kGroup);
    }
  }
  for (int k = 0; k < kPassColumns; k += 2) {
    __m512i lanes[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      lanes[g] = _mm512_loadu_si512(x + g * group_stride + k * kGroup);
    }
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, weights + i * kSparseUnitColumns + k, sizeof pair);
      const __m512i w = _mm512_set1_epi32(pair);
      for (int g = 0; g < kGroups; ++g) sum[i][g] = dot(sum[i][g], w, lanes[g]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int g = 0; g < kGroups; ++g) {
      _mm512_store_ps(acc + i * kWideMBlock + g * kGroup, sum[i][g]);
    }
  }
}

template <int kGroups>
void multiply(WideScratch& s, int rows, int columns, const uint16_t* x, int64_t group_stride,
              int64_t m) {
  constexpr int kRows = kAccumulators / kGroups;
  for (int k = 0; k < columns; k += kPassColumns) {
    for (int r = 0; r < rows; r += kRows) {
      microkernel<kRows, kGroups>(s.weights[r] + k, x + k * kGroup, group_stride, s.acc[r] + m);
    }
  }
}

// Rows r0 to r0 + rows - 1 (a multiple of 16) of a tile, rows m0 to m0 + m_count - 1 of x.
void run_wide(const GemmArgs& args, const WideX& x, const Tile& tile, int r0, int rows, int64_t m0,
              int64_t m_count, WideScratch& s) {
  const E4m3ToBf16 convert;
  const int64_t groups = format::ceil_div(m_count, kGroup);
  for (int r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g)
      _mm512_store_ps(s.acc[r] + g * kGroup, _mm512_setzero_ps());
  }
  for (int64_t u = 0; u < tile.units(); ++u) {
    const bool is_sparse = tile.is_sparse(u);
    for (int r = 0; r < rows; ++r) {
      is_sparse ? decode_sparse(tile.unit(u), r0 + r, convert, s.weights[r])
                : decode_dense(tile.unit(u), r0 + r, convert, s.weights[r]);
    }
    const int columns = is_sparse ? kSparseUnitColumns : kDenseUnitColumns;
    const uint16_t* at = x.x + m0 / kGroup * x.group_stride + tile.column(u) * kGroup;
    int64_t g = 0;
    for (; g + 4 <= groups; g += 4) {
      multiply<4>(s, rows, columns, at + g * x.group_stride, x.group_stride, g * kGroup);
    }
    for (; g + 2 <= groups; g += 2) {
      multiply<2>(s, rows, columns, at + g * x.group_stride, x.group_stride, g * kGroup);
    }
    if (g < groups) {
      multiply<1>(s, rows, columns, at + g * x.group_stride, x.group_stride, g * kGroup);
    }
  }
  for (int r = 0; r < rows && r0 + r < tile.rows; r += 16) {
    const int64_t n = tile.first_row + r0 + r;
    const ColumnScales columns(args, n, static_cast<int>(min64(16, tile.rows - r0 - r)));
    for (int64_t m = 0; m < m_count; m += kGroup) {
      __m512i block[16];
      for (int i = 0; i < 16; ++i) block[i] = _mm512_load_si512(s.acc[r + i] + m);
      transpose16(block);
      for (int64_t i = 0; i < min64(kGroup, m_count - m); ++i) {
        columns.store(args, m0 + m + i, n, _mm512_castsi512_ps(block[i]), x.scale[m0 + m + i]);
      }
    }
  }
}

}  // namespace
}  // namespace spense::cpu
