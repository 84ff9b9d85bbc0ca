// SPDX-License-Identifier: Apache-2.0
// Offline kernels: they move each byte once and are bound by that, so they stay simple.
#include <algorithm>

#include "cuda/pack.h"
#include "device/launch.h"
#include "format/tile_stream.h"

namespace spense::cuda {
namespace {

using namespace spense::format;

constexpr int kThreads = 256;
constexpr int kChunk = 16;  // value bytes that one thread of the packer writes
constexpr uint8_t kNegativeZero = 0x80;

struct Payload {
  const uint8_t *values, *indices, *dense;
};

__device__ int64_t tiles_of(const PackLayout& p) { return tile_count(p.n); }
__device__ int real_rows(const PackLayout& p, int tile) {
  const int64_t left = p.n - static_cast<int64_t>(tile) * kTileRows;
  return left < kTileRows ? static_cast<int>(left) : kTileRows;
}
__device__ int step(const int32_t* map, int column) {
  return map ? map[column / kGranule] * kGranule + column % kGranule : column;
}
__device__ uint8_t positive_zero(uint8_t v) { return v == kNegativeZero ? 0 : v; }
__device__ bool is_nan(uint8_t v) { return (v & 0x7F) == 0x7F; }

// One row of one block [shard][tile] of the checkpoint arrays.
struct BlockRow {
  int sparse, dense_width, groups;  // columns, columns, groups of 4
  int64_t values, indices, dense;   // byte offsets of the row

  __device__ BlockRow(const PackLayout& p, int shard, int tile, int row) {
    const int columns = static_cast<int>(p.k / p.k_shards);
    const BlockOffsets at = p.offsets[shard * tiles_of(p) + tile];
    sparse = p.sparse_columns[tile];
    dense_width = columns - sparse;
    groups = (sparse + 3) / 4;
    values = at.values + static_cast<int64_t>(row) * 2 * groups;
    indices = at.indices + static_cast<int64_t>(row) * ((groups + 1) / 2);
    dense = at.dense + static_cast<int64_t>(row) * dense_width;
  }
  __device__ uint8_t nibble(const Payload& in, int group) const {
    return in.indices[indices + group / 2] >> (group % 2 * 4) & 15;
  }
};

__device__ uint8_t logical_byte(const Payload& in, const BlockRow& row, int position) {
  if (position >= row.sparse) return in.dense[row.dense + position - row.sparse];
  const int group = position / 4, place = position % 4;
  const uint8_t nibble = row.nibble(in, group);
  if ((nibble & 3) == place) return in.values[row.values + 2 * group];
  if ((nibble >> 2) == place) return in.values[row.values + 2 * group + 1];
  return 0;
}

// A CTA a unit; a thread fills 16 value bytes of a row, and of a sparse unit their metadata.
__global__ void __launch_bounds__(kThreads)
    pack_units(const PackLayout p, const Payload in, uint8_t* w_packed) {
  const int unit_index = blockIdx.x;
  int tile = 0, beyond = static_cast<int>(tiles_of(p));
  while (beyond - tile > 1) {
    const int middle = (tile + beyond) / 2;
    (p.tiles[middle * kTileTableColumns + kUnitPrefix] <= unit_index ? tile : beyond) = middle;
  }
  const int32_t* entry = p.tiles + tile * kTileTableColumns;
  const int sparse_unit_count = entry[kSparseUnits];
  const int unit = unit_index - entry[kUnitPrefix];
  const bool sparse = unit < sparse_unit_count;
  uint8_t* out = w_packed + static_cast<int64_t>(entry[kOffsetBlocks]) * kBlockBytes +
                 unit_offset(unit, sparse_unit_count);
  const int column0 = sparse ? unit * kSparseUnitColumns
                             : sparse_unit_count * kSparseUnitColumns +
                                   (unit - sparse_unit_count) * kDenseUnitColumns;
  const int shard_columns = static_cast<int>(p.k / p.k_shards);

  for (int item = threadIdx.x; item < kTileRows * (kRowBytes / kChunk); item += kThreads) {
    const int row = item / (kRowBytes / kChunk), chunk = item % (kRowBytes / kChunk);
    const bool real = row < real_rows(p, tile);
    alignas(16) uint8_t bytes[kChunk] = {};
    if (sparse) {
      constexpr int kColumns = kChunk * 2;  // logical columns of the chunk
      uint32_t metadata = kEmptyNibble * 0x11111111u;
      if (real) {
        metadata = 0;
#pragma unroll
        for (int part = 0; part < kColumns; part += kGranule) {
          const int q = step(p.shard_of_gather, column0 + chunk * kColumns + part);
          const int shard = q / shard_columns, group0 = (q - shard * shard_columns) / 4;
          const BlockRow source(p, shard, tile, row);
#pragma unroll
          for (int g = 0; g < kGranule / 4; ++g) {
            const int place = part / 4 + g;
            const int64_t at = source.values + 2 * (group0 + g);
            bytes[2 * place] = positive_zero(in.values[at]);
            bytes[2 * place + 1] = positive_zero(in.values[at + 1]);
            metadata |= static_cast<uint32_t>(source.nibble(in, group0 + g)) << (4 * place);
          }
        }
      }
      *reinterpret_cast<uint32_t*>(out + metadata_offset(row, chunk * kColumns)) = metadata;
    } else if (real) {
      const int column = column0 + chunk * kChunk;
      const int left = static_cast<int>(p.k) - column;
      if (left > 0) {
        const int q = step(p.shard_of_gather, column);
        const int shard = q / shard_columns, position = q - shard * shard_columns;
        const BlockRow source(p, shard, tile, row);
        for (int i = 0; i < min(left, kChunk); ++i) {
          bytes[i] = positive_zero(logical_byte(in, source, position + i));
        }
      }
    }
    *reinterpret_cast<uint4*>(out + value_offset(row, chunk * kChunk)) =
        *reinterpret_cast<const uint4*>(bytes);
  }
}

// The packed tile seen as a matrix of logical bytes.
struct PackedTile {
  const uint8_t* base;
  int sparse_unit_count;

  __device__ uint8_t byte(int row, int column) const {
    const int unit = column / kSparseUnitColumns;
    if (unit >= sparse_unit_count) {
      const int behind = column - sparse_unit_count * kSparseUnitColumns;
      return base[unit_offset(sparse_unit_count + behind / kDenseUnitColumns, sparse_unit_count) +
                  value_offset(row, behind % kDenseUnitColumns)];
    }
    const uint8_t* at = base + unit_offset(unit, sparse_unit_count);
    const int inside = column % kSparseUnitColumns, place = inside % 4, pair = inside / 4 * 2;
    const uint8_t nibble = at[metadata_offset(row, inside)] >> (inside / 4 % 2 * 4) & 15;
    if ((nibble & 3) == place) return at[value_offset(row, pair)];
    if ((nibble >> 2) == place) return at[value_offset(row, pair + 1)];
    return 0;
  }
};

// Items of the checkpoint form: a row of a block in steps of 8 positions.
constexpr int kStep = 8;

template <typename Body>
__device__ void for_each_step(const PackLayout& p, Body body) {
  const int shard = blockIdx.y, tile = blockIdx.x;
  const int shard_columns = static_cast<int>(p.k / p.k_shards);
  const int steps = (shard_columns + kStep - 1) / kStep;
  for (int item = threadIdx.x; item < real_rows(p, tile) * steps; item += kThreads) {
    const int row = item / steps, position = item % steps * kStep;
    body(BlockRow(p, shard, tile, row), row, position, min(kStep, shard_columns - position));
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack_blocks(const PackLayout p, const uint8_t* w_packed, uint8_t* values, uint8_t* indices,
                  uint8_t* dense) {
  const int32_t* entry = p.tiles + blockIdx.x * kTileTableColumns;
  const PackedTile tile{w_packed + static_cast<int64_t>(entry[kOffsetBlocks]) * kBlockBytes,
                        entry[kSparseUnits]};
  const int shard0 = blockIdx.y * static_cast<int>(p.k / p.k_shards);
  for_each_step(p, [&](const BlockRow& out, int row, int position, int count) {
    const int column = step(p.gather_of_shard, shard0 + position);
    uint8_t nibbles[kStep / 4] = {kEmptyNibble, kEmptyNibble};
    for (int i = 0; i < count; ++i) {
      if (position + i >= out.sparse) {
        dense[out.dense + position + i - out.sparse] = positive_zero(tile.byte(row, column + i));
      }
    }
    for (int g = 0; g < kStep / 4; ++g) {
      const int group = position / 4 + g;
      if (group >= out.groups) break;
      int found = 0, places[2] = {0, 1};
      uint8_t kept[2] = {0, 0};
      for (int i = 0; i < 4 && group * 4 + i < out.sparse; ++i) {
        const uint8_t v = positive_zero(tile.byte(row, column + g * 4 + i));
        if (v == 0 || found == 2) continue;
        kept[found] = v;
        places[found++] = i;
      }
      if (found == 1) {  // one value at place i: (0, 1) for i = 0, else (0, i) with value 0 first
        places[1] = places[0] == 0 ? 1 : places[0];
        if (places[0] != 0) {
          kept[1] = kept[0];
          kept[0] = 0;
          places[0] = 0;
        }
      }
      nibbles[g] = make_nibble(places[0], places[1]);
      values[out.values + 2 * group] = kept[0];
      values[out.values + 2 * group + 1] = kept[1];
    }
    if (position / 4 < out.groups) {
      indices[out.indices + position / kStep] = static_cast<uint8_t>(nibbles[0] | nibbles[1] << 4);
    }
  });
}

__global__ void __launch_bounds__(kThreads)
    check_blocks(const PackLayout p, const Payload in, int32_t* bad) {
  bool wrong = false;
  for_each_step(p, [&](const BlockRow& row, int, int position, int count) {
    for (int i = 0; i < count; ++i) {
      if (position + i >= row.sparse) {
        wrong |= is_nan(in.dense[row.dense + position + i - row.sparse]);
      }
    }
    for (int g = 0; g < kStep / 4; ++g) {
      const int group = position / 4 + g;
      if (group > row.groups || position / 4 >= row.groups) break;
      if (group == row.groups) {  // the unused nibble of an odd number of groups
        wrong |= group % 2 == 1 && row.nibble(in, group) != kEmptyNibble;
        break;
      }
      const uint8_t nibble = row.nibble(in, group);
      wrong |= !legal_nibble(nibble);
      for (int j = 0; j < 2; ++j) {
        const uint8_t v = in.values[row.values + 2 * group + j];
        const int place = j ? nibble >> 2 : nibble & 3;
        wrong |= is_nan(v) || (group * 4 + place >= row.sparse && v != 0);
      }
    }
  });
  if (wrong) *bad = 1;
}

dim3 blocks(const PackLayout& layout) {
  return dim3(static_cast<unsigned>(tile_count(layout.n)), static_cast<unsigned>(layout.k_shards));
}

}  // namespace

void pack(const PackLayout& layout, const uint8_t* values, const uint8_t* indices,
          const uint8_t* dense, uint8_t* w_packed, Stream stream) {
  LaunchShape shape{dim3(static_cast<unsigned>(layout.total_units)), dim3(kThreads)};
  launch(&pack_units, shape, stream, layout, Payload{values, indices, dense}, w_packed);
}

void unpack(const PackLayout& layout, const uint8_t* w_packed, uint8_t* values, uint8_t* indices,
            uint8_t* dense, Stream stream) {
  LaunchShape shape{blocks(layout), dim3(kThreads)};
  launch(&unpack_blocks, shape, stream, layout, w_packed, values, indices, dense);
}

void check_payload(const PackLayout& layout, const uint8_t* values, const uint8_t* indices,
                   const uint8_t* dense, int32_t* bad, Stream stream) {
  LaunchShape shape{blocks(layout), dim3(kThreads)};
  launch(&check_blocks, shape, stream, layout, Payload{values, indices, dense}, bad);
}

}  // namespace spense::cuda
