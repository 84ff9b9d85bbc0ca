// SPDX-License-Identifier: Apache-2.0
// Takes the place of CUDA's header when the model compiles kernels for the host.
#pragma once

#include <cstdint>

// What the copy engine knows about a matrix: see device/tensor_map.h.
struct CUtensorMap_st {
  const uint8_t* data;
  int64_t rows, columns, stride;
  int box_rows;
  bool swizzle;
};
using CUtensorMap = CUtensorMap_st;
