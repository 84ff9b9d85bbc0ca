// SPDX-License-Identifier: Apache-2.0
// The tile stream, layout version 1: the one statement of which byte of a packed weight holds what.
//
//   tile = 128 output rows = [ sparse unit x su | dense unit x du ]
//   sparse unit: 128 rows x 256 logical columns -> 16 KiB kept values, then 4 KiB metadata
//   dense unit:  128 rows x 128 columns         -> 16 KiB values
//
// Each unit is the shared-memory image that SM90 (wgmma) and SM100 (tcgen05) read with a 128-byte
// swizzle, so that one bulk copy moves it. Host, device and tests share these functions.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SPENSE_HD __host__ __device__
#else
#define SPENSE_HD
#endif

namespace spense::format {

inline constexpr int kLayoutVersion = 1;
inline constexpr int kTileRows = 128;           // output rows of a tile
inline constexpr int kSparseUnitColumns = 256;  // logical columns of a sparse unit
inline constexpr int kDenseUnitColumns = 128;   // columns of a dense unit
inline constexpr int kRowBytes = 128;           // value bytes of a row in either unit
inline constexpr int kValueBytes = kTileRows * kRowBytes;
inline constexpr int kMetadataRowBytes = 16;  // of one row and one 128-column block
inline constexpr int kMetadataBytes = kTileRows * kSparseUnitColumns / 8;
inline constexpr int kSparseUnitBytes = kValueBytes + kMetadataBytes;
inline constexpr int kDenseUnitBytes = kValueBytes;
inline constexpr int kBlockBytes = 4096;  // unit of the offsets in the tile table
inline constexpr int kTileTableColumns = 4;
inline constexpr int kGranule = 16;  // dense widths are multiples of this

// Two kept places that are always legal (0 and 1); hardware calls equal places invalid.
inline constexpr uint8_t kEmptyNibble = 0x4;

static_assert(kMetadataBytes == 4096 && kSparseUnitBytes == 20480 && kDenseUnitBytes == 16384);
static_assert(kSparseUnitBytes % kBlockBytes == 0 && kDenseUnitBytes % kBlockBytes == 0);

// Columns of the tile table, one row a tile and one for the end.
enum TileColumn : int { kOffsetBlocks = 0, kSparseUnits = 1, kDenseUnits = 2, kUnitPrefix = 3 };

SPENSE_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SPENSE_HD constexpr int64_t padded_k(int64_t k) {
  return ceil_div(k, kDenseUnitColumns) * kDenseUnitColumns;
}
SPENSE_HD constexpr int64_t tile_count(int64_t n) { return ceil_div(n, kTileRows); }

// Units of a tile whose first `sparse_columns` columns (in gather order) are 2:4 sparse.
SPENSE_HD constexpr int64_t sparse_units(int64_t sparse_columns) {
  return sparse_columns / kSparseUnitColumns;
}
SPENSE_HD constexpr int64_t dense_units(int64_t k, int64_t sparse_unit_count) {
  return (padded_k(k) - sparse_unit_count * kSparseUnitColumns) / kDenseUnitColumns;
}
SPENSE_HD constexpr int64_t tile_bytes(int64_t sparse_unit_count, int64_t dense_unit_count) {
  return sparse_unit_count * kSparseUnitBytes + dense_unit_count * kDenseUnitBytes;
}
// Byte offset of unit u inside its tile.
SPENSE_HD constexpr int64_t unit_offset(int64_t u, int64_t sparse_unit_count) {
  return u < sparse_unit_count
             ? u * kSparseUnitBytes
             : sparse_unit_count * kSparseUnitBytes + (u - sparse_unit_count) * kDenseUnitBytes;
}

// Byte in a unit of value j (kept value of a sparse row, column of a dense row) of row m.
SPENSE_HD constexpr int value_offset(int m, int j) {
  return (m / 8) * 1024 + (m % 8) * 128 + (((j / 16) ^ (m % 8)) * 16) + j % 16;
}
// Byte in a sparse unit that holds the two nibbles of logical columns [k & ~7, (k & ~7) + 8).
SPENSE_HD constexpr int metadata_offset(int m, int k) {
  return kValueBytes + (k / 128) * (kTileRows * kMetadataRowBytes) + m * kMetadataRowBytes +
         (k % 128) / 8;
}

SPENSE_HD constexpr uint8_t make_nibble(int first, int second) {
  return static_cast<uint8_t>(first | (second << 2));
}
SPENSE_HD constexpr bool legal_nibble(uint8_t nibble) {
  return nibble < 16 && (nibble & 3) < (nibble >> 2);
}

}  // namespace spense::format
