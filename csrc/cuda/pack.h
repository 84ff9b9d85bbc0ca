// SPDX-License-Identifier: Apache-2.0
// The packer and unpacker on the GPU: the same bytes as format::pack and format::unpack.
#pragma once

#include "cuda/api.h"

namespace spense::cuda {

// Where the blocks [shard][tile] of the checkpoint arrays begin.
struct BlockOffsets {
  int64_t values, indices, dense;
};

// Everything on the device. Columns are named by c, their place in gather order, and by q = shard *
// shard_columns + position. For one shard the two are the same; for more the maps go in steps of
// 16 columns (format::kGranule), which shells never cut.
struct PackLayout {
  int64_t n = 0, k = 0, k_shards = 1;
  const int32_t* tiles = nullptr;            // w_tiles [tiles + 1, 4]
  const int32_t* sparse_columns = nullptr;   // [tiles], of one shard
  const BlockOffsets* offsets = nullptr;     // [shards, tiles]
  const int32_t* shard_of_gather = nullptr;  // [k / 16]: q / 16 of c / 16, null for one shard
  const int32_t* gather_of_shard = nullptr;  // [k / 16]: c / 16 of q / 16, null for one shard
  int64_t total_units = 0;
};

// Neither lets the next kernel start early: a GEMM behind it reads weights before its wait.
SPENSE_API void pack(const PackLayout& layout, const uint8_t* values, const uint8_t* indices,
                     const uint8_t* dense, uint8_t* w_packed, Stream stream);
SPENSE_API void unpack(const PackLayout& layout, const uint8_t* w_packed, uint8_t* values,
                       uint8_t* indices, uint8_t* dense, Stream stream);

// Sets *bad to 1 when the arrays hold what format::check_payload refuses. *bad must be 0 before.
SPENSE_API void check_payload(const PackLayout& layout, const uint8_t* values,
                              const uint8_t* indices, const uint8_t* dense, int32_t* bad,
                              Stream stream);

}  // namespace spense::cuda
