// SPDX-License-Identifier: Apache-2.0
// Hybrid GEMM on the CPU, straight from the tile stream:
//
//   y[m, n] = acc[m, n] * x_scale[m] * w_scale[n] + bias[n],   acc = sum_k x[m, k] * w[n, k]
//
// with acc and the rest in float32, rounded once to the output type. x is e4m3 in gather order.
// A row of x that holds a NaN gives a row of NaN and touches no other row. What an element of y is
// does not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace spense::cpu {

struct GemmArgs {
  int64_t m = 0, n = 0, k = 0;
  const uint8_t* x = nullptr;  // [m, k], rows x_stride bytes apart; nothing behind column k is read
  int64_t x_stride = 0;
  const uint8_t* w = nullptr;      // tile stream, 16-byte aligned
  const int32_t* tiles = nullptr;  // [tile_count(n) + 1, 4]
  const float* x_scale = nullptr;  // [m] with step 1, [1] with step 0
  int64_t x_scale_step = 1;
  const float* w_scale = nullptr;  // [n]
  const float* bias = nullptr;     // [n] or null
  void* y = nullptr;               // [m, n], contiguous
  OutType out = OutType::kBFloat16;
};

struct GemmConfig;

// What one call does. Run it as
//   plan = config.plan(args, threads);  ws = workspace_bytes, 64-byte aligned, uninitialised
//   parallel_for(0, plan.prepare_items): config.prepare(plan, ws, begin, end)   -- all of it, then
//   parallel_for(0, plan.run_items):     config.run(plan, ws, begin, end)
// Any cut of the two ranges over any threads gives the same bytes. prepare_items counts pieces of
// prepare_block rows of x.
struct GemmPlan {
  GemmArgs args;
  int threads = 1;
  size_t workspace_bytes = 0;
  int64_t prepare_items = 0;
  int64_t run_items = 0;
  int kind = 0;                        // a config's own choice of method
  int64_t m_block = 0, row_block = 0;  // rows of x and rows of a tile in one item
  int64_t prepare_block = 1;           // rows (groups of rows) of x in one item of prepare
};

struct GemmConfig {
  const char* name;
  bool (*available)();
  GemmPlan (*plan)(const GemmArgs& args, int threads);
  void (*prepare)(const GemmPlan& plan, void* workspace, int64_t begin, int64_t end);
  void (*run)(const GemmPlan& plan, void* workspace, int64_t begin, int64_t end);
};

extern const GemmConfig kGemmReference, kGemmPortable;
#if defined(__x86_64__)
extern const GemmConfig kGemmAvx2, kGemmAvx512;
#endif

}  // namespace spense::cpu
