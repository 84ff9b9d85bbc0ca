// SPDX-License-Identifier: Apache-2.0
// Parameters of the kernels of the SM90 family, the same for all of them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/types.h"
#include "heuristics/gemm.h"

namespace spense::sm90 {

// Everything a launch needs.
struct Params {
  CUtensorMap y_map;     // y as [m, 2 n] bytes, in boxes of store_tokens x 128, if staged
  CUtensorMap x_map;     // x as [m, k] bytes, in boxes of tile_tokens / cluster x 128
  const uint8_t* w;      // tile stream
  const int4* tiles;     // w_tiles
  const float* x_scale;  // [m] with step 1, [1] with step 0
  const float* w_scale;  // [n]
  const float* bias;     // [n] or null
  void* y;               // [m, n]
  float* partials;       // [2 * CTAs, 128 * tokens]
  uint32_t* counters;    // [CTAs, 2] and one for tickets, zero between launches
  uint64_t w_policy;     // L2 policy of the weights
  int32_t x_scale_step, m, n;
  int32_t tile_tokens;  // of a token tile, at most the config's
  OutType out;
  bool wide_rows;    // rows of y begin at 16-byte boundaries
  bool staged;       // y is written through shared memory and y_map
  int32_t w_window;  // units on their way at a time
  heuristics::ScheduleParams schedule;
};

}  // namespace spense::sm90
