// SPDX-License-Identifier: Apache-2.0
// What the GEMM configurations share. Everything has internal linkage, because it is compiled once
// for each instruction set.
#pragma once

#include "core/fp8.h"
#include "cpu/gemm.h"
#include "format/tile_stream.h"

namespace spense::cpu {
namespace {

using format::kDenseUnitColumns;
using format::kRowBytes;
using format::kSparseUnitColumns;
using format::kTileRows;

struct Tile {
  const uint8_t* bytes;
  int64_t sparse_units, dense_units;
  int64_t first_row;  // of y's columns
  int rows;           // real rows

  int64_t units() const { return sparse_units + dense_units; }
  bool is_sparse(int64_t unit) const { return unit < sparse_units; }
  const uint8_t* unit(int64_t u) const { return bytes + format::unit_offset(u, sparse_units); }
  // First column of x (gather order) that unit u multiplies.
  int64_t column(int64_t u) const {
    return is_sparse(u)
               ? u * kSparseUnitColumns
               : sparse_units * kSparseUnitColumns + (u - sparse_units) * kDenseUnitColumns;
  }
};

[[maybe_unused]] Tile tile_of(const GemmArgs& args, int64_t t) {
  const int32_t* row = args.tiles + t * format::kTileTableColumns;
  const int64_t left = args.n - t * kTileRows;
  return {args.w + static_cast<int64_t>(row[format::kOffsetBlocks]) * format::kBlockBytes,
          row[format::kSparseUnits], row[format::kDenseUnits], t * kTileRows,
          left < kTileRows ? static_cast<int>(left) : kTileRows};
}

// The scale of row m of x, or NaN when the row holds a NaN: so the whole row of y becomes NaN, also
// where the weights would have skipped the column.
[[maybe_unused]] float row_scale(const GemmArgs& args, int64_t m) {
  const uint8_t* row = args.x + m * args.x_stride;
  bool has_nan = false;
  for (int64_t k = 0; k < args.k; ++k) has_nan |= is_e4m3_nan(row[k]);
  return has_nan ? __builtin_nanf("") : args.x_scale[m * args.x_scale_step];
}

[[maybe_unused]] float finish(const GemmArgs& args, float acc, float scale, int64_t n) {
  const float scaled = acc * scale * args.w_scale[n];
  return args.bias ? scaled + args.bias[n] : scaled;
}

// Items of prepare are worth a thread's wake-up: `units` pieces of `elements` values each.
[[maybe_unused]] void cut_prepare(GemmPlan& plan, int64_t units, int64_t elements) {
  constexpr int64_t kWorthAThread = 1 << 15;
  const int64_t block = kWorthAThread / elements;
  plan.prepare_block = block < 1 ? 1 : block;
  plan.prepare_items = format::ceil_div(units, plan.prepare_block);
}

[[maybe_unused]] int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

[[maybe_unused]] bool always_available() { return true; }

}  // namespace
}  // namespace spense::cpu
