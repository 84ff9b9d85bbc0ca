// SPDX-License-Identifier: Apache-2.0
// Between the checkpoint form of a layer (values, indices, dense: docs/format.md) and the tile
// stream (tile_stream.h). Host code. Everything works on a range of tiles, so callers can thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format/tile_stream.h"

namespace spense::format {

// The split of a layer, as far as the payload depends on it.
struct SplitDesc {
  int64_t n = 0, k = 0, k_shards = 1;
  const int64_t* dense_width = nullptr;  // [tile_count(n)], dense columns per K shard
};

// First problem found, or ok. `message()` reads after "pack: ", e.g.
// "dense: expected no NaN byte, got 0x7F (shard 0, tile 3, row 17, column 40)".
struct Status {
  enum Code : int {
    kOk = 0,
    kBadShape,             // n, k or k_shards (position 0 to 2) = value, or k's divisor (3)
    kBadWidth,             // dense_width[tile] = value
    kIllegalNibble,        // value: the nibble
    kIllegalPackedNibble,  // the same in the tile stream
    kNanValue,             // value: the byte
    kNanDense,             // value: the byte
    kNonzeroPadding,       // a kept value behind the last column of a short group; value: the byte
    kBadPaddedNibble,      // the unused high nibble of an odd group count; value: the nibble
    kNotTwoOfFour,         // more than two of four columns of a sparse group are set (unpack)
    kBadTileTable,         // w_tiles row `tile`, column `position` = value, want `expected`
    kBadPackedSize,        // bytes of w_packed = value, want `expected`
  };
  Code code = kOk;
  int64_t shard = -1, tile = -1, row = -1, position = -1, value = 0, expected = 0;

  bool ok() const { return code == kOk; }
  std::string message() const;
};

Status check_split(const SplitDesc& split);

struct PayloadSizes {
  int64_t values = 0, indices = 0, dense = 0, packed = 0;  // bytes
  int64_t tiles = 0;                                       // w_tiles has tiles + 1 rows
};

// Where the blocks of each tile lie, in both forms. Build it once a layer from a split that
// check_split() accepts; `split.dense_width` must outlive it.
class PayloadLayout {
 public:
  explicit PayloadLayout(const SplitDesc& split);

  const SplitDesc& split() const { return split_; }
  int64_t shard_columns() const { return split_.k / split_.k_shards; }
  int64_t tiles() const { return static_cast<int64_t>(tile_.size()) - 1; }
  int64_t rows(int64_t tile) const;            // real rows, 1..128
  int64_t sparse_columns(int64_t tile) const;  // of one shard
  PayloadSizes sizes() const;

  // Byte offsets of block [shard][tile] in the checkpoint arrays.
  int64_t values_offset(int64_t shard, int64_t tile) const;
  int64_t indices_offset(int64_t shard, int64_t tile) const;
  int64_t dense_offset(int64_t shard, int64_t tile) const;
  int64_t packed_offset(int64_t tile) const { return tile_[tile].packed; }

  // Boundaries of the shells (position in a shard), from 0 to shard_columns(), ascending.
  const std::vector<int64_t>& shells() const { return shells_; }

  // Writes w_tiles, int32 [tiles + 1, 4].
  void write_tile_table(int32_t* tiles) const;

 private:
  struct Prefix {
    int64_t values = 0, indices = 0, dense = 0, packed = 0;
  };
  SplitDesc split_;
  std::vector<Prefix> tile_;  // [tiles + 1]
  std::vector<int64_t> shells_;
};

// Finds illegal nibbles, NaN bytes and non-zero padding in tiles [begin, end) of the checkpoint
// arrays. Reports the first in [tile][shard] order.
Status check_payload(const PayloadLayout& layout, const uint8_t* values, const uint8_t* indices,
                     const uint8_t* dense, int64_t begin, int64_t end);

// Packs tiles [begin, end) from arrays that check_payload() accepts. Kept places stay as given
// (canonical or not); -0.0 (0x80) becomes 0x00.
void pack(const PayloadLayout& layout, const uint8_t* values, const uint8_t* indices,
          const uint8_t* dense, uint8_t* w_packed, int64_t begin, int64_t end);

// Writes the checkpoint form of tiles [begin, end) in the canonical encoding, up to the first tile
// that no pack() can have written.
Status unpack(const PayloadLayout& layout, const uint8_t* w_packed, uint8_t* values,
              uint8_t* indices, uint8_t* dense, int64_t begin, int64_t end);

// Whether `tiles` [tile_count(n) + 1, 4] is a table that kernels can follow without leaving
// w_packed: offsets and prefixes add up, units cover padded_k(k), the end matches the size.
Status check_tile_table(int64_t n, int64_t k, const int32_t* tiles, int64_t w_packed_bytes);

// Whether a tile table is the one that `layout` writes.
Status check_tile_table(const PayloadLayout& layout, const int32_t* tiles, int64_t w_packed_bytes);

}  // namespace spense::format
