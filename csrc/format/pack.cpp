// SPDX-License-Identifier: Apache-2.0
// Both directions go through one row of a tile in gather order: `columns` bytes of it for the part
// that is written out, kept pairs and nibbles for the part that is not.
#include "format/pack.h"

#include <algorithm>
#include <cstring>

namespace spense::format {
namespace {

constexpr uint8_t kNegativeZero = 0x80;

// A run of positions of one shard, in gather order. Runs of sparse columns start at a group and,
// save for the last group of a row, end at one.
struct Run {
  int64_t shard, begin, end;
};

struct TileRuns {
  std::vector<Run> sparse, dense;
};

// One shard keeps its own order. More of them interleave shell by shell, so that a tile's sparse
// columns come first whatever its width.
TileRuns tile_runs(const PayloadLayout& layout, int64_t tile) {
  const int64_t shards = layout.split().k_shards;
  const int64_t boundary = layout.sparse_columns(tile), columns = layout.shard_columns();
  TileRuns runs;
  if (shards == 1) {
    if (boundary > 0) runs.sparse.push_back({0, 0, boundary});
    if (boundary < columns) runs.dense.push_back({0, boundary, columns});
    return runs;
  }
  const auto& shells = layout.shells();
  for (size_t i = 0; i + 1 < shells.size(); ++i) {
    auto& target = shells[i] < boundary ? runs.sparse : runs.dense;
    for (int64_t s = 0; s < shards; ++s) target.push_back({s, shells[i], shells[i + 1]});
  }
  return runs;
}

uint8_t read_nibble(const uint8_t* indices, int64_t group) {
  return (indices[group / 2] >> (4 * (group % 2))) & 0xF;
}

struct UnitCounts {
  int64_t sparse, dense;
};

UnitCounts unit_counts(const PayloadLayout& layout, int64_t tile) {
  const SplitDesc& split = layout.split();
  const int64_t sparse = sparse_units(split.k_shards * layout.sparse_columns(tile));
  return {sparse, dense_units(split.k, sparse)};
}

// A row of a tile in gather order.
struct Row {
  std::vector<uint8_t> kept;     // of the sparse units: two a group
  std::vector<uint8_t> nibbles;  // of the sparse units: one a group
  std::vector<uint8_t> columns;  // of the dense units, pruned zeros written out

  Row(UnitCounts units)
      : kept(units.sparse * kRowBytes),
        nibbles(units.sparse * kSparseUnitColumns / 4),
        columns(units.dense * kDenseUnitColumns) {}

  void clear() {
    std::fill(kept.begin(), kept.end(), uint8_t{0});
    std::fill(nibbles.begin(), nibbles.end(), kEmptyNibble);
    std::fill(columns.begin(), columns.end(), uint8_t{0});
  }
};

void write_row(const Row& row, UnitCounts units, int m, uint8_t* tile) {
  for (int64_t u = 0; u < units.sparse + units.dense; ++u) {
    const bool is_sparse = u < units.sparse;
    uint8_t* unit = tile + unit_offset(u, units.sparse);
    const uint8_t* bytes = is_sparse ? row.kept.data() + u * kRowBytes
                                     : row.columns.data() + (u - units.sparse) * kRowBytes;
    for (int j = 0; j < kRowBytes; j += 16) std::memcpy(unit + value_offset(m, j), bytes + j, 16);
    if (!is_sparse) continue;
    const uint8_t* nibbles = row.nibbles.data() + u * kSparseUnitColumns / 4;
    for (int k = 0; k < kSparseUnitColumns; k += 8) {
      unit[metadata_offset(m, k)] =
          static_cast<uint8_t>(nibbles[k / 4] | (nibbles[k / 4 + 1] << 4));
    }
  }
}

void read_row(Row& row, UnitCounts units, int m, const uint8_t* tile) {
  for (int64_t u = 0; u < units.sparse + units.dense; ++u) {
    const bool is_sparse = u < units.sparse;
    const uint8_t* unit = tile + unit_offset(u, units.sparse);
    uint8_t* bytes = is_sparse ? row.kept.data() + u * kRowBytes
                               : row.columns.data() + (u - units.sparse) * kRowBytes;
    for (int j = 0; j < kRowBytes; j += 16) std::memcpy(bytes + j, unit + value_offset(m, j), 16);
    if (!is_sparse) continue;
    uint8_t* nibbles = row.nibbles.data() + u * kSparseUnitColumns / 4;
    for (int k = 0; k < kSparseUnitColumns; k += 8) {
      const uint8_t byte = unit[metadata_offset(m, k)];
      nibbles[k / 4] = byte & 0xF;
      nibbles[k / 4 + 1] = byte >> 4;
    }
  }
}

uint8_t positive_zero(uint8_t byte) { return byte == kNegativeZero ? uint8_t{0} : byte; }

// Writes one group in the canonical encoding; false when more than two are set.
bool encode_group(const uint8_t* columns, uint8_t* values, uint8_t* nibble) {
  int places[4], count = 0;
  for (int i = 0; i < 4; ++i) {
    if (positive_zero(columns[i]) != 0) places[count++] = i;
  }
  if (count > 2) return false;
  int first = 0, second = 1;
  if (count == 2) first = places[0], second = places[1];
  if (count == 1 && places[0] > 0) second = places[0];
  *nibble = make_nibble(first, second);
  values[0] = positive_zero(columns[first]);
  values[1] = positive_zero(columns[second]);
  return true;
}

// Reads group g (gather order) of a row as four columns; false when its nibble is illegal.
bool decode_group(const Row& row, int64_t group, uint8_t* columns) {
  const int64_t in_units = static_cast<int64_t>(row.nibbles.size());
  if (group >= in_units) {
    std::memcpy(columns, row.columns.data() + 4 * (group - in_units), 4);
    return true;
  }
  std::memset(columns, 0, 4);
  columns[row.nibbles[group] & 3] = row.kept[2 * group];
  columns[row.nibbles[group] >> 2] = row.kept[2 * group + 1];
  return legal_nibble(row.nibbles[group]);
}

void pack_tile(const PayloadLayout& layout, int64_t tile, const uint8_t* values,
               const uint8_t* indices, const uint8_t* dense, uint8_t* packed) {
  const UnitCounts units = unit_counts(layout, tile);
  const TileRuns runs = tile_runs(layout, tile);
  const int64_t boundary = layout.sparse_columns(tile);
  const int64_t groups = ceil_div(boundary, 4), index_bytes = ceil_div(groups, 2);
  const int64_t width = layout.shard_columns() - boundary;
  const int64_t groups_in_units = units.sparse * kSparseUnitColumns / 4;
  Row row(units);
  for (int m = 0; m < kTileRows; ++m) {
    row.clear();
    if (m < layout.rows(tile)) {
      int64_t group = 0;
      for (const Run& run : runs.sparse) {
        const uint8_t* from = values + layout.values_offset(run.shard, tile) + m * 2 * groups;
        const uint8_t* bits = indices + layout.indices_offset(run.shard, tile) + m * index_bytes;
        for (int64_t g = run.begin / 4; g < ceil_div(run.end, 4); ++g, ++group) {
          const uint8_t nibble = read_nibble(bits, g);
          const uint8_t pair[2] = {positive_zero(from[2 * g]), positive_zero(from[2 * g + 1])};
          if (group < groups_in_units) {
            row.nibbles[group] = nibble;
            std::memcpy(&row.kept[2 * group], pair, 2);
            continue;
          }
          const int64_t column = 4 * (group - groups_in_units);
          // A short last group may name places behind its columns; the bytes there are zero.
          if (pair[0]) row.columns[column + (nibble & 3)] = pair[0];
          if (pair[1]) row.columns[column + (nibble >> 2)] = pair[1];
        }
      }
      int64_t column = layout.split().k_shards * boundary - units.sparse * kSparseUnitColumns;
      for (const Run& run : runs.dense) {
        const uint8_t* from = dense + layout.dense_offset(run.shard, tile) + m * width - boundary;
        for (int64_t p = run.begin; p < run.end; ++p) {
          row.columns[column++] = positive_zero(from[p]);
        }
      }
    }
    write_row(row, units, m, packed);
  }
}

Status unpack_tile(const PayloadLayout& layout, int64_t tile, const uint8_t* packed,
                   uint8_t* values, uint8_t* indices, uint8_t* dense) {
  const UnitCounts units = unit_counts(layout, tile);
  const TileRuns runs = tile_runs(layout, tile);
  const int64_t boundary = layout.sparse_columns(tile);
  const int64_t groups = ceil_div(boundary, 4), index_bytes = ceil_div(groups, 2);
  const int64_t width = layout.shard_columns() - boundary;
  Row row(units);
  for (int m = 0; m < layout.rows(tile); ++m) {
    read_row(row, units, m, packed);
    int64_t group = 0;
    for (const Run& run : runs.sparse) {
      uint8_t* to = values + layout.values_offset(run.shard, tile) + m * 2 * groups;
      uint8_t* bits = indices + layout.indices_offset(run.shard, tile) + m * index_bytes;
      for (int64_t g = run.begin / 4; g < ceil_div(run.end, 4); ++g, ++group) {
        uint8_t columns[4], nibble = kEmptyNibble;
        const bool legal = decode_group(row, group, columns);
        for (int64_t c = run.end - 4 * g; c < 4; ++c) columns[c] = 0;
        const bool encoded = encode_group(columns, to + 2 * g, &nibble);
        if (!legal || !encoded) {
          Status status;
          status.code = legal ? Status::kNotTwoOfFour : Status::kIllegalPackedNibble;
          status.shard = run.shard;
          status.tile = tile;
          status.row = m;
          status.position = g;
          status.value = legal ? 0 : row.nibbles[group];
          return status;
        }
        // An odd count leaves the empty nibble in the last byte.
        bits[g / 2] = g % 2 == 0 ? static_cast<uint8_t>(nibble | (kEmptyNibble << 4))
                                 : static_cast<uint8_t>((bits[g / 2] & 0xF) | (nibble << 4));
      }
    }
    int64_t column = layout.split().k_shards * boundary - units.sparse * kSparseUnitColumns;
    for (const Run& run : runs.dense) {
      uint8_t* to = dense + layout.dense_offset(run.shard, tile) + m * width - boundary;
      for (int64_t p = run.begin; p < run.end; ++p) to[p] = positive_zero(row.columns[column++]);
    }
  }
  return {};
}

}  // namespace

PayloadLayout::PayloadLayout(const SplitDesc& split) : split_(split) {
  const int64_t tiles = tile_count(split.n);
  tile_.resize(tiles + 1);
  shells_ = {0, shard_columns()};
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t columns = sparse_columns(t), groups = ceil_div(columns, 4);
    const UnitCounts units = unit_counts(*this, t);
    tile_[t + 1].values = tile_[t].values + rows(t) * 2 * groups;
    tile_[t + 1].indices = tile_[t].indices + rows(t) * ceil_div(groups, 2);
    tile_[t + 1].dense = tile_[t].dense + rows(t) * split.dense_width[t];
    tile_[t + 1].packed = tile_[t].packed + tile_bytes(units.sparse, units.dense);
    shells_.push_back(columns);
  }
  std::sort(shells_.begin(), shells_.end());
  shells_.erase(std::unique(shells_.begin(), shells_.end()), shells_.end());
}

int64_t PayloadLayout::rows(int64_t tile) const {
  return std::min<int64_t>(kTileRows, split_.n - tile * kTileRows);
}

int64_t PayloadLayout::sparse_columns(int64_t tile) const {
  return shard_columns() - split_.dense_width[tile];
}

PayloadSizes PayloadLayout::sizes() const {
  const Prefix& end = tile_.back();
  return {split_.k_shards * end.values, split_.k_shards * end.indices, split_.k_shards * end.dense,
          end.packed, tiles()};
}

int64_t PayloadLayout::values_offset(int64_t shard, int64_t tile) const {
  return shard * tile_.back().values + tile_[tile].values;
}
int64_t PayloadLayout::indices_offset(int64_t shard, int64_t tile) const {
  return shard * tile_.back().indices + tile_[tile].indices;
}
int64_t PayloadLayout::dense_offset(int64_t shard, int64_t tile) const {
  return shard * tile_.back().dense + tile_[tile].dense;
}

void PayloadLayout::write_tile_table(int32_t* tiles) const {
  int64_t prefix = 0;
  for (int64_t t = 0; t <= this->tiles(); ++t) {
    const UnitCounts units = t < this->tiles() ? unit_counts(*this, t) : UnitCounts{0, 0};
    int32_t* row = tiles + t * kTileTableColumns;
    row[kOffsetBlocks] = static_cast<int32_t>(tile_[t].packed / kBlockBytes);
    row[kSparseUnits] = static_cast<int32_t>(units.sparse);
    row[kDenseUnits] = static_cast<int32_t>(units.dense);
    row[kUnitPrefix] = static_cast<int32_t>(prefix);
    prefix += units.sparse + units.dense;
  }
}

void pack(const PayloadLayout& layout, const uint8_t* values, const uint8_t* indices,
          const uint8_t* dense, uint8_t* w_packed, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    pack_tile(layout, t, values, indices, dense, w_packed + layout.packed_offset(t));
  }
}

Status unpack(const PayloadLayout& layout, const uint8_t* w_packed, uint8_t* values,
              uint8_t* indices, uint8_t* dense, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const Status status =
        unpack_tile(layout, t, w_packed + layout.packed_offset(t), values, indices, dense);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace spense::format
