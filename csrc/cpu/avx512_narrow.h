// SPDX-License-Identifier: Apache-2.0
// Few rows of x: the weights stream once from memory, and x is gathered, not w expanded.
//
// 128 columns of a sparse row are 64 kept bytes (one cache line; its four 16-byte chunks lie in the
// order chunk ^ (row & 3)) and 16 bytes of metadata. The kept bytes become two bf16 vectors in
// unpacked order, the metadata two vectors of places, and vpermt2w picks the partners from the
// 64 columns of x that each vector meets. Lanes keep the order of memory: the places follow it.
#pragma once

#include "cpu/avx512.h"

namespace spense::cpu {
namespace {

constexpr int kNarrowMax = 20;       // rows of x
constexpr int kNarrowPass = 8;       // rows of x in one pass over an item
constexpr int kNarrowRowBlock = 32;  // rows of a tile in one item, at most
constexpr int kBlockColumns = 128;   // of a sparse row handled at a time

// x in the workspace, [m][padded k] bf16 twice:
//   sparse: each 128 columns as columns 32 c + (0..15), c = 0..3, then 32 c + 16 + (0..15)
//   dense:  each 64 columns in unpacked order
struct NarrowX {
  uint16_t *sparse, *dense;
  float* scale;
  int64_t stride;  // elements

  NarrowX(const GemmArgs& args, void* workspace) : stride(format::padded_k(args.k)) {
    sparse = static_cast<uint16_t*>(workspace);
    dense = sparse + args.m * stride;
    scale = reinterpret_cast<float*>(dense + args.m * stride);
  }
  static size_t bytes(const GemmArgs& args) {
    return args.m * (format::padded_k(args.k) * 2 * sizeof(uint16_t) + sizeof(float));
  }
};

void prepare_narrow(const GemmArgs& args, const NarrowX& x, int64_t m) {
  const E4m3ToBf16 convert;
  const __m512i natural = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const uint8_t* row = args.x + m * args.x_stride;
  for (int64_t k = 0; k < x.stride; k += kBlockColumns) {
    const __m512i a = load_x(row, k, args.k), b = load_x(row, k + 64, args.k);
    const Bf16Pair dense[2] = {convert(a), convert(b)};
    const __m512i halves[2] = {_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xDD)};
    for (int i = 0; i < 2; ++i) {
      const Bf16Pair half = convert(_mm512_permutexvar_epi64(natural, halves[i]));
      uint16_t* sparse_out = x.sparse + m * x.stride + k + 64 * i;
      uint16_t* dense_out = x.dense + m * x.stride + k + 64 * i;
      _mm512_storeu_si512(sparse_out, half.first);
      _mm512_storeu_si512(sparse_out + 32, half.second);
      _mm512_storeu_si512(dense_out, dense[i].first);
      _mm512_storeu_si512(dense_out + 32, dense[i].second);
    }
  }
  x.scale[m] = row_scale512(args, m);
}

// Constant operands, by row & 3 where they follow the order of the chunks.
struct NarrowTables {
  alignas(64) uint32_t metadata[4][16];  // dword of the metadata that lane l needs
  alignas(64) uint16_t base[4][32];      // first column of the group of each kept value
  alignas(64) uint8_t shift[2][64];      // bit in the dword of each kept value's place
  alignas(64) uint64_t chunks[4][8];     // puts the chunks of a dense row in order
  constexpr NarrowTables() : metadata(), base(), shift(), chunks() {
    for (int s = 0; s < 4; ++s) {
      for (int lane = 0; lane < 4; ++lane) {
        const int chunk = lane ^ s;
        for (int i = 0; i < 4; ++i) metadata[s][4 * lane + i] = chunk;
        for (int i = 0; i < 8; ++i) base[s][8 * lane + i] = 16 * chunk + 4 * (i / 2);
        for (int i = 0; i < 2; ++i) chunks[s][2 * lane + i] = 2 * chunk + i;
      }
    }
    for (int byte = 0; byte < 64; ++byte) {
      shift[0][byte] = static_cast<uint8_t>(2 * (byte % 16 / 2));
      shift[1][byte] = static_cast<uint8_t>(16 + shift[0][byte]);
    }
  }
};
constexpr NarrowTables kNarrowTables;

static_assert(format::value_offset(5, 0) == 5 * kRowBytes + 64 + 16);

// The cache line with kept values (columns) 64 * half to 64 * half + 63 of a row.
const uint8_t* value_line(const uint8_t* unit, int row, int half) {
  return unit + row * kRowBytes + (half ^ (row >> 2 & 1)) * 64;
}

// x of kM rows over 128 columns: in registers while they last.
template <int kM>
struct XBlock {
  static constexpr bool kHeld = kM <= 4;
  const uint16_t* at;
  int64_t stride;
  __m512i held[kHeld ? kM : 1][4];

  XBlock(const uint16_t* x, int64_t x_stride) : at(x), stride(x_stride) {
    if constexpr (kHeld) {
      for (int m = 0; m < kM; ++m) {
        for (int i = 0; i < 4; ++i) held[m][i] = _mm512_load_si512(at + m * stride + 32 * i);
      }
    }
  }
  __m512i get(int m, int i) const {
    if constexpr (kHeld) return held[m][i];
    return _mm512_load_si512(at + m * stride + 32 * i);
  }
};

template <int kM>
void narrow_sparse(const uint8_t* unit, int r0, int rows, const uint16_t* x, int64_t x_stride,
                   __m512 (*acc)[kM], const uint8_t* next) {
  const E4m3ToBf16 convert;
  const __m512i shift0 = _mm512_load_si512(kNarrowTables.shift[0]);
  const __m512i shift1 = _mm512_load_si512(kNarrowTables.shift[1]);
  const __m512i low_bits = _mm512_set1_epi16(3);
  for (int half = 0; half < 2; ++half) {
    const XBlock<kM> block(x + half * kBlockColumns, x_stride);
    for (int r = r0; r < r0 + rows; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(value_line(next, r, half)), _MM_HINT_T1);
      const uint8_t* metadata = unit + format::metadata_offset(r, half * kBlockColumns);
      if (r % 4 == 0) {
        _mm_prefetch(reinterpret_cast<const char*>(next + (metadata - unit)), _MM_HINT_T1);
      }
      const Bf16Pair w = convert(_mm512_loadu_si512(value_line(unit, r, half)));
      const __m512i bits = _mm512_permutexvar_epi32(
          _mm512_load_si512(kNarrowTables.metadata[r & 3]),
          _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(metadata))));
      const __m512i base = _mm512_load_si512(kNarrowTables.base[r & 3]);
      // (place & 3) | base
      const __m512i place0 = _mm512_ternarylogic_epi32(_mm512_multishift_epi64_epi8(shift0, bits),
                                                       low_bits, base, 0xEA);
      const __m512i place1 = _mm512_ternarylogic_epi32(_mm512_multishift_epi64_epi8(shift1, bits),
                                                       low_bits, base, 0xEA);
      for (int m = 0; m < kM; ++m) {
        __m512 sum = acc[r - r0][m];
        sum =
            dot(sum, w.first, _mm512_permutex2var_epi16(block.get(m, 0), place0, block.get(m, 1)));
        sum =
            dot(sum, w.second, _mm512_permutex2var_epi16(block.get(m, 2), place1, block.get(m, 3)));
        acc[r - r0][m] = sum;
      }
    }
  }
}

template <int kM>
void narrow_dense(const uint8_t* unit, int r0, int rows, const uint16_t* x, int64_t x_stride,
                  __m512 (*acc)[kM], const uint8_t* next) {
  const E4m3ToBf16 convert;
  const XBlock<kM> block(x, x_stride);
  for (int r = r0; r < r0 + rows; ++r) {
    const __m512i order = _mm512_load_si512(kNarrowTables.chunks[r & 3]);
    for (int half = 0; half < 2; ++half) {
      _mm_prefetch(reinterpret_cast<const char*>(value_line(next, r, half)), _MM_HINT_T1);
      const Bf16Pair w =
          convert(_mm512_permutexvar_epi64(order, _mm512_loadu_si512(value_line(unit, r, half))));
      for (int m = 0; m < kM; ++m) {
        acc[r - r0][m] = dot(acc[r - r0][m], w.first, block.get(m, 2 * half));
        acc[r - r0][m] = dot(acc[r - r0][m], w.second, block.get(m, 2 * half + 1));
      }
    }
  }
}

// Rows r0 to r0 + rows - 1 of a tile, rows m0 to m0 + kM - 1 of x. `next_item` is read afterwards.
template <int kM>
void run_narrow(const GemmArgs& args, const NarrowX& x, int64_t m0, const Tile& tile, int r0,
                int rows, const uint8_t* next_item) {
  __m512 acc[kNarrowRowBlock][kM];
  for (int r = 0; r < rows; ++r) {
    for (int m = 0; m < kM; ++m) acc[r][m] = _mm512_setzero_ps();
  }
  for (int64_t u = 0; u < tile.units(); ++u) {
    const uint8_t* next = u + 1 < tile.units() ? tile.unit(u + 1) : next_item;
    const int64_t column = tile.column(u) + m0 * x.stride;
    if (tile.is_sparse(u)) {
      narrow_sparse<kM>(tile.unit(u), r0, rows, x.sparse + column, x.stride, acc, next);
    } else {
      narrow_dense<kM>(tile.unit(u), r0, rows, x.dense + column, x.stride, acc, next);
    }
  }
  for (int r = 0; r < rows && r0 + r < tile.rows; r += 16) {
    const int64_t n = tile.first_row + r0 + r;
    const ColumnScales columns(args, n, static_cast<int>(min64(16, tile.rows - r0 - r)));
    for (int m = 0; m < kM; ++m) {
      __m512 lanes[16];
      for (int i = 0; i < 16; ++i) lanes[i] = acc[r + i][m];
      columns.store(args, m0 + m, n, sum_rows(lanes), x.scale[m0 + m]);
    }
  }
}

}  // namespace
}  // namespace spense::cpu
