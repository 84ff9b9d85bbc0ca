// SPDX-License-Identifier: Apache-2.0
// Parameters of the kernels of the SM100 family, the same for all of them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/types.h"
#include "heuristics/schedule.h"

namespace spense::sm100 {

// Everything a launch needs.
struct Params {
  CUtensorMap x_map;       // x as [m, k] bytes, in boxes of tokens / ctas / pairs x 128
  CUtensorMap sparse_map;  // the tile stream as rows of 128 bytes, in boxes of a sparse unit
  CUtensorMap dense_map;   // the same in boxes of a dense unit; both for pairs of CTAs only
  const uint8_t* w;        // tile stream
  const int4* tiles;       // w_tiles
  const float* x_scale;    // [m] with step 1, [1] with step 0
  const float* w_scale;    // [n]
  const float* bias;       // [n] or null
  void* y;                 // [m, n]
  float* partials;         // [2 * CTAs, tokens, 128]
  uint32_t* counters;      // [CTAs, 4], zero between launches
  uint64_t w_policy;       // L2 policy of the weights
  int32_t x_scale_step, m, n;
  OutType out;
  heuristics::ScheduleParams schedule;
};

}  // namespace spense::sm100
