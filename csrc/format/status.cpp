// SPDX-License-Identifier: Apache-2.0
// What can be wrong with a split, a payload or a tile table, and how it is told.
#include <cstdio>
#include <string>

#include "core/fp8.h"
#include "format/pack.h"

namespace spense::format {
namespace {

std::string hex(int64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%02llX", static_cast<unsigned long long>(value));
  return text;
}

std::string place(const Status& status, const char* position_name) {
  std::string text = " (shard " + std::to_string(status.shard) + ", tile " +
                     std::to_string(status.tile) + ", row " + std::to_string(status.row);
  return text + ", " + position_name + " " + std::to_string(status.position) + ")";
}

Status table_problem(int64_t row, int64_t column, int64_t value, int64_t expected) {
  Status status;
  status.code = Status::kBadTileTable;
  status.tile = row;
  status.position = column;
  status.value = value;
  status.expected = expected;
  return status;
}

Status size_problem(int64_t value, int64_t expected) {
  Status status;
  status.code = Status::kBadPackedSize;
  status.value = value;
  status.expected = expected;
  return status;
}

// Walks the table; units(tile) gives the sparse units that a tile must have, or -1 for any.
template <typename Units>
Status check_table(int64_t n, int64_t k, const int32_t* tiles, int64_t bytes, Units units) {
  const int64_t count = tile_count(n);
  int64_t blocks = 0, prefix = 0;
  for (int64_t t = 0; t <= count; ++t) {
    const int32_t* row = tiles + t * kTileTableColumns;
    int64_t sparse = 0, dense = 0;
    if (t < count) {
      sparse = units(t);
      const int64_t most = padded_k(k) / kSparseUnitColumns;
      if (sparse < 0)
        sparse = row[kSparseUnits] >= 0 && row[kSparseUnits] <= most ? row[kSparseUnits] : most;
      dense = dense_units(k, sparse);
    }
    const int64_t expected[kTileTableColumns] = {blocks, sparse, dense, prefix};
    for (int column = 0; column < kTileTableColumns; ++column) {
      if (row[column] != expected[column]) {
        return table_problem(t, column, row[column], expected[column]);
      }
    }
    blocks += tile_bytes(sparse, dense) / kBlockBytes;
    prefix += sparse + dense;
  }
  if (bytes != blocks * kBlockBytes) return size_problem(bytes, blocks * kBlockBytes);
  return {};
}

}  // namespace

std::string Status::message() const {
  const auto number = [](int64_t v) { return std::to_string(v); };
  switch (code) {
    case kOk:
      return "ok";
    case kBadShape: {
      const char* const names[] = {"n", "k", "k_shards"};
      if (position < 3)
        return std::string(names[position]) + ": expected at least 1, got " + number(value);
      return "k: expected a multiple of 16 * k_shards = " + number(expected) + ", got " +
             number(value);
    }
    case kBadWidth:
      return "dense_width: expected 0, " + number(expected) +
             " or a multiple of 16 below it, got " + number(value) + " (tile " + number(tile) + ")";
    case kIllegalNibble:
      return "indices: expected a legal 2:4 nibble (0x4, 0x8, 0x9, 0xC, 0xD, 0xE), got " +
             hex(value) + place(*this, "group");
    case kIllegalPackedNibble:
      return "w_packed: expected a legal 2:4 nibble (0x4, 0x8, 0x9, 0xC, 0xD, 0xE), got " +
             hex(value) + place(*this, "group");
    case kNanValue:
      return "values: expected no NaN byte, got " + hex(value) + place(*this, "value");
    case kNanDense:
      return "dense: expected no NaN byte, got " + hex(value) + place(*this, "column");
    case kNonzeroPadding:
      return "values: expected 0x00 behind the last column, got " + hex(value) +
             place(*this, "value");
    case kBadPaddedNibble:
      return "indices: expected 0x4 in the unused nibble, got " + hex(value) +
             place(*this, "group");
    case kNotTwoOfFour:
      return "w_packed: expected at most two values in four sparse columns, got more" +
             place(*this, "group");
    case kBadTileTable:
      return "w_tiles: expected " + number(expected) + " at [" + number(tile) + ", " +
             number(position) + "], got " + number(value);
    case kBadPackedSize:
      return "w_packed: expected " + number(expected) + " bytes, got " + number(value);
  }
  return "unknown";
}

Status check_split(const SplitDesc& split) {
  Status status;
  status.code = Status::kBadShape;
  status.position = 0;
  for (const int64_t size : {split.n, split.k, split.k_shards}) {
    status.value = size;
    if (size < 1) return status;
    ++status.position;
  }
  status.value = split.k;
  status.expected = kGranule * split.k_shards;
  if (split.k_shards > 1 && split.k % (kGranule * split.k_shards) != 0) return status;
  const int64_t columns = split.k / split.k_shards;
  for (int64_t t = 0; t < tile_count(split.n); ++t) {
    const int64_t width = split.dense_width[t];
    if (width == columns || (width >= 0 && width < columns && width % kGranule == 0)) continue;
    status.code = Status::kBadWidth;
    status.tile = t;
    status.value = width;
    status.expected = columns;
    return status;
  }
  return {};
}

Status check_payload(const PayloadLayout& layout, const uint8_t* values, const uint8_t* indices,
                     const uint8_t* dense, int64_t begin, int64_t end) {
  Status status;
  const auto fail = [&](Status::Code code, int64_t row, int64_t position, int64_t value) {
    status.code = code;
    status.row = row;
    status.position = position;
    status.value = value;
    return status;
  };
  for (int64_t t = begin; t < end; ++t) {
    status.tile = t;
    const int64_t columns = layout.sparse_columns(t), width = layout.shard_columns() - columns;
    const int64_t groups = ceil_div(columns, 4), index_bytes = ceil_div(groups, 2);
    for (int64_t s = 0; s < layout.split().k_shards; ++s) {
      status.shard = s;
      for (int64_t m = 0; m < layout.rows(t); ++m) {
        const uint8_t* row_values = values + layout.values_offset(s, t) + m * 2 * groups;
        const uint8_t* row_indices = indices + layout.indices_offset(s, t) + m * index_bytes;
        const uint8_t* row_dense = dense + layout.dense_offset(s, t) + m * width;
        for (int64_t g = 0; g < 2 * index_bytes; ++g) {
          const uint8_t nibble = (row_indices[g / 2] >> (4 * (g % 2))) & 0xF;
          if (g >= groups) {
            if (nibble != kEmptyNibble) return fail(Status::kBadPaddedNibble, m, g, nibble);
            continue;
          }
          if (!legal_nibble(nibble)) return fail(Status::kIllegalNibble, m, g, nibble);
          const int64_t places[2] = {4 * g + (nibble & 3), 4 * g + (nibble >> 2)};
          for (int i = 0; i < 2; ++i) {
            const uint8_t byte = row_values[2 * g + i];
            if (is_e4m3_nan(byte)) return fail(Status::kNanValue, m, 2 * g + i, byte);
            if (places[i] >= columns && (byte & 0x7F) != 0) {
              return fail(Status::kNonzeroPadding, m, 2 * g + i, byte);
            }
          }
        }
        for (int64_t c = 0; c < width; ++c) {
          if (is_e4m3_nan(row_dense[c])) return fail(Status::kNanDense, m, c, row_dense[c]);
        }
      }
    }
  }
  return {};
}

Status check_tile_table(int64_t n, int64_t k, const int32_t* tiles, int64_t w_packed_bytes) {
  return check_table(n, k, tiles, w_packed_bytes, [](int64_t) { return int64_t{-1}; });
}

Status check_tile_table(const PayloadLayout& layout, const int32_t* tiles, int64_t w_packed_bytes) {
  const SplitDesc& split = layout.split();
  return check_table(split.n, split.k, tiles, w_packed_bytes, [&](int64_t t) {
    return sparse_units(split.k_shards * layout.sparse_columns(t));
  });
}

}  // namespace spense::format
