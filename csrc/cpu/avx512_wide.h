// SPDX-License-Identifier: Apache-2.0
// Many rows of x. A vector holds 16 weight rows, a 32-bit lane two weights of a row. Half units
// (128 columns) of 64 rows are decoded once and multiplied with all rows of x in the item:
//
//   dense   [64 pairs of columns][4 vectors]: dot product with the pair of x, broadcast
//   sparse  [32 groups of columns][4 vectors] of kept pairs, and as many vectors of byte controls:
//           the group's four x are broadcast, vpshufb gives each row the two it keeps, so that
//           pruned weights cost no dot product
//
// Sums are [row of x][64 rows of w] float32. No element of y depends on how items are cut.
#pragma once

#include "cpu/avx512.h"

namespace spense::cpu {
namespace {

constexpr int kWideVectors = 4;
constexpr int kWideRowBlock = 16 * kWideVectors;  // weight rows of an item
constexpr int kWideTokens = 4;                    // rows of x in the microkernel
constexpr int64_t kWideMBlock = 512;              // rows of x in an item, at most
constexpr int kStepColumns = 128;                 // a dense unit, half a sparse unit
constexpr int kStepPairs = kStepColumns / 2;
constexpr int kStepGroups = kStepColumns / 4;

// x in the workspace: [padded k / 128][m][128] bf16, so that a step reads one piece of memory.
struct WideX {
  uint16_t* x;
  float* scale;
  int64_t m;

  WideX(const GemmArgs& args, void* workspace) : x(static_cast<uint16_t*>(workspace)), m(args.m) {
    scale = reinterpret_cast<float*>(x + args.m * format::padded_k(args.k));
  }
  // From column k (a multiple of 128) of row m_begin on.
  uint16_t* at(int64_t m_begin, int64_t k) const { return x + k * m + m_begin * kStepColumns; }
  static size_t bytes(const GemmArgs& args) {
    return args.m * (format::padded_k(args.k) * sizeof(uint16_t) + sizeof(float));
  }
};

void prepare_wide(const GemmArgs& args, const WideX& out, int64_t m) {
  const E4m3ToBf16 convert;
  const __m512i natural = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const uint8_t* row = args.x + m * args.x_stride;
  for (int64_t k = 0; k < format::padded_k(args.k); k += 64) {
    const Bf16Pair x = convert(_mm512_permutexvar_epi64(natural, load_x(row, k, args.k)));
    uint16_t* to = out.at(m, k / kStepColumns * kStepColumns) + k % kStepColumns;
    _mm512_storeu_si512(to, x.first);
    _mm512_storeu_si512(to + 32, x.second);
  }
  out.scale[m] = row_scale512(args, m);
}

struct WideScratch {
  alignas(64) uint32_t pairs[kStepPairs][kWideVectors][16];      // two bf16 weights
  alignas(64) uint32_t controls[kStepGroups][kWideVectors][16];  // four byte places
  alignas(64) float acc[kWideMBlock][kWideRowBlock];
};

// vpshufb control of a nibble: bytes of the two kept columns among four bf16 values.
struct ShuffleControls {
  alignas(64) uint32_t of[16];
  constexpr ShuffleControls() : of() {
    for (uint32_t nibble = 0; nibble < 16; ++nibble) {
      const uint32_t first = 2 * (nibble & 3), second = 2 * (nibble >> 2);
      of[nibble] = first | (first + 1) << 8 | second << 16 | (second + 1) << 24;
    }
  }
};
constexpr ShuffleControls kShuffleControls;

// Sixteen bytes of each of sixteen rows, turned round: out[i] lane r = dword i of row r. Row i
// starts at rows + i * kRowStride; its chunk lies `chunk ^ 16 (i % 8)` bytes on if kSwizzled.
template <int kRowStride, bool kSwizzled>
void transpose_chunks(const uint8_t* rows, size_t chunk, __m512i out[4]) {
  const auto row = [&](size_t i) {
    return load128(rows + i * kRowStride + (kSwizzled ? chunk ^ (i % 8 * 16) : chunk));
  };
  __m512i t[4];
#pragma GCC unroll 4
  for (size_t q = 0; q < 4; ++q) {  // lane j of t[q] is row 4 j + q
    t[q] = _mm512_castsi128_si512(row(q));
    t[q] = _mm512_inserti32x4(t[q], row(4 + q), 1);
    t[q] = _mm512_inserti32x4(t[q], row(8 + q), 2);
    t[q] = _mm512_inserti32x4(t[q], row(12 + q), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(t[0], t[1]), b = _mm512_unpackhi_epi32(t[0], t[1]);
  const __m512i c = _mm512_unpacklo_epi32(t[2], t[3]), d = _mm512_unpackhi_epi32(t[2], t[3]);
  out[0] = _mm512_unpacklo_epi64(a, c);
  out[1] = _mm512_unpackhi_epi64(a, c);
  out[2] = _mm512_unpacklo_epi64(b, d);
  out[3] = _mm512_unpackhi_epi64(b, d);
}
static_assert(format::value_offset(16 + 13, 80) == (16 + 13) * kRowBytes + (80 ^ (13 % 8 * 16)));
static_assert(format::metadata_offset(17, 0) == format::metadata_offset(16, 0) + 16);

// Values j0 to j0 + 2 * kCount - 1 of 16 rows from r (a multiple of 16) on, into vector v.
template <int kCount>
void decode_values(const uint8_t* unit, int r, size_t j0, const E4m3ToBf16& convert, WideScratch& s,
                   int v) {
  for (size_t p = 0; p < kCount; p += 8) {
    __m512i fours[4];  // four bytes, two pairs, of each row
    transpose_chunks<kRowBytes, true>(unit + r * kRowBytes, j0 + 2 * p, fours);
    for (int i = 0; i < 4; ++i) {
      const Bf16Pair w = convert(fours[i]);
      const __m512 first = _mm512_castsi512_ps(w.first), second = _mm512_castsi512_ps(w.second);
      _mm512_store_ps(s.pairs[p + 2 * i][v], _mm512_shuffle_ps(first, second, 0x88));
      _mm512_store_ps(s.pairs[p + 2 * i + 1][v], _mm512_shuffle_ps(first, second, 0xDD));
    }
  }
}

// Controls of the groups of columns k0 to k0 + kStepColumns - 1.
void decode_controls(const uint8_t* unit, int r, int k0, WideScratch& s, int v) {
  const __m512i table = _mm512_load_si512(kShuffleControls.of);
  __m512i nibbles[4];  // eight groups of each row
  transpose_chunks<format::kMetadataRowBytes, false>(unit + format::metadata_offset(r, k0), 0,
                                                     nibbles);
  for (int i = 0; i < 4; ++i) {
    for (int g = 0; g < 8; ++g) {  // vpermd looks at the low four bits only
      const __m512i nibble = _mm512_srli_epi32(nibbles[i], 4 * g);
      _mm512_store_si512(s.controls[8 * i + g][v], _mm512_permutexvar_epi32(nibble, table));
    }
  }
}

// Half of 16 rows of the unit that comes next.
void prefetch_rows(const uint8_t* unit, int r, int half) {
  const char* values = reinterpret_cast<const char*>(unit + r * kRowBytes + 64 * half);
  for (int i = 0; i < 16; ++i) _mm_prefetch(values + i * kRowBytes, _MM_HINT_T1);
  const char* metadata =
      reinterpret_cast<const char*>(unit + format::metadata_offset(r, kStepColumns * half));
  for (int i = 0; i < 4; ++i) _mm_prefetch(metadata + 64 * i, _MM_HINT_T1);
}

// acc[m][...] += 64 rows over a step, for kTokens rows of x.
template <bool kSparse, int kTokens>
void multiply_step(const WideScratch& s, const uint16_t* x, float (*acc)[kWideRowBlock]) {
  __m512 sum[kTokens][kWideVectors];
  for (int m = 0; m < kTokens; ++m) {
    for (int v = 0; v < kWideVectors; ++v) sum[m][v] = _mm512_load_ps(acc[m] + 16 * v);
  }
  for (int p = 0; p < (kSparse ? kStepGroups : kStepPairs); ++p) {
    __m512i w[kWideVectors], control[kWideVectors];
    for (int v = 0; v < kWideVectors; ++v) {
      w[v] = _mm512_load_si512(s.pairs[p][v]);
      if constexpr (kSparse) control[v] = _mm512_load_si512(s.controls[p][v]);
    }
    for (int m = 0; m < kTokens; ++m) {
      if constexpr (kSparse) {
        int64_t four;
        __builtin_memcpy(&four, x + m * kStepColumns + 4 * p, sizeof four);
        const __m512i lanes = _mm512_set1_epi64(four);
        for (int v = 0; v < kWideVectors; ++v) {
          sum[m][v] = dot(sum[m][v], w[v], _mm512_shuffle_epi8(lanes, control[v]));
        }
      } else {
        int32_t two;
        __builtin_memcpy(&two, x + m * kStepColumns + 2 * p, sizeof two);
        const __m512i lanes = _mm512_set1_epi32(two);
        for (int v = 0; v < kWideVectors; ++v) sum[m][v] = dot(sum[m][v], w[v], lanes);
      }
    }
  }
  for (int m = 0; m < kTokens; ++m) {
    for (int v = 0; v < kWideVectors; ++v) _mm512_store_ps(acc[m] + 16 * v, sum[m][v]);
  }
}

template <bool kSparse>
void multiply_all(WideScratch& s, const uint16_t* x, int64_t m_count) {
  int64_t m = 0;
  for (; m + kWideTokens <= m_count; m += kWideTokens) {
    multiply_step<kSparse, kWideTokens>(s, x + m * kStepColumns, s.acc + m);
  }
  if (m + 2 <= m_count) {
    multiply_step<kSparse, 2>(s, x + m * kStepColumns, s.acc + m);
    m += 2;
  }
  if (m < m_count) multiply_step<kSparse, 1>(s, x + m * kStepColumns, s.acc + m);
}

// Rows r0 to r0 + 63 of a tile, rows m0 to m0 + m_count - 1 of x.
void run_wide(const GemmArgs& args, const WideX& x, const Tile& tile, int r0, int64_t m0,
              int64_t m_count, WideScratch& s) {
  const E4m3ToBf16 convert;
  for (int64_t m = 0; m < m_count; ++m) {
    for (int v = 0; v < kWideVectors; ++v) _mm512_store_ps(s.acc[m] + 16 * v, _mm512_setzero_ps());
  }
  for (int64_t u = 0; u < tile.units(); ++u) {
    const uint8_t* unit = tile.unit(u);
    const uint8_t* next = u + 1 < tile.units() ? tile.unit(u + 1) : unit;
    const int64_t column = tile.column(u);
    if (!tile.is_sparse(u)) {
      for (int v = 0; v < kWideVectors; ++v) {
        prefetch_rows(next, r0 + 16 * v, 0);
        prefetch_rows(next, r0 + 16 * v, 1);
        decode_values<kStepPairs>(unit, r0 + 16 * v, 0, convert, s, v);
      }
      multiply_all<false>(s, x.at(m0, column), m_count);
      continue;
    }
    for (int half = 0; half < 2; ++half) {
      for (int v = 0; v < kWideVectors; ++v) {
        prefetch_rows(next, r0 + 16 * v, half);
        decode_values<kStepGroups>(unit, r0 + 16 * v, 64 * half, convert, s, v);
        decode_controls(unit, r0 + 16 * v, kStepColumns * half, s, v);
      }
      multiply_all<true>(s, x.at(m0, column + kStepColumns * half), m_count);
    }
  }
  for (int r = 0; r < kWideRowBlock && r0 + r < tile.rows; r += 16) {
    const int64_t n = tile.first_row + r0 + r;
    const ColumnScales columns(args, n, static_cast<int>(min64(16, tile.rows - r0 - r)));
    for (int64_t m = 0; m < m_count; ++m) {
      columns.store(args, m0 + m, n, _mm512_load_ps(s.acc[m] + r), x.scale[m0 + m]);
    }
  }
}

}  // namespace
}  // namespace spense::cpu
