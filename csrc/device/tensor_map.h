// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

struct CUtensorMap_st;

namespace spense::cuda {

// A matrix of bytes, rows `stride` apart, copied in boxes of box_rows x 128 bytes, with the
// 128-byte swizzle or as it is. What lies outside the matrix reads as zero.
struct ByteMatrix {
  const void* data;
  int64_t rows, columns, stride;  // data 16-byte aligned, stride a multiple of 16
  int box_rows;
  bool swizzle = true;
};

CUtensorMap_st tensor_map(const ByteMatrix& matrix);

}  // namespace spense::cuda
