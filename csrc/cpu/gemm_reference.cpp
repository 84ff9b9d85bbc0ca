// SPDX-License-Identifier: Apache-2.0
// The arithmetic written down, one value at a time: what every other configuration must compute.
#include "cpu/gemm_common.h"

namespace spense::cpu {
namespace {

using format::metadata_offset;
using format::value_offset;

// Row r of a tile times a row of x. Columns behind k exist only as padding, with weight zero.
float dot(const Tile& tile, int r, const uint8_t* x, int64_t k) {
  const auto product = [&](uint8_t weight, int64_t column) {
    return column < k ? e4m3_to_float(weight) * e4m3_to_float(x[column]) : 0.0f;
  };
  float acc = 0.0f;
  for (int64_t u = 0; u < tile.units(); ++u) {
    const uint8_t* unit = tile.unit(u);
    const int64_t first = tile.column(u);
    if (tile.is_sparse(u)) {
      for (int group = 0; group < kSparseUnitColumns / 4; ++group) {
        const int nibble = (unit[metadata_offset(r, 4 * group)] >> (4 * (group % 2))) & 0xF;
        const int64_t column = first + 4 * group;
        acc += product(unit[value_offset(r, 2 * group)], column + (nibble & 3));
        acc += product(unit[value_offset(r, 2 * group + 1)], column + (nibble >> 2));
      }
    } else {
      for (int j = 0; j < kDenseUnitColumns; ++j) {
        acc += product(unit[value_offset(r, j)], first + j);
      }
    }
  }
  return acc;
}

// One item is one tile of one row of x.
GemmPlan plan(const GemmArgs& args, int threads) {
  GemmPlan plan;
  plan.args = args;
  plan.threads = threads;
  plan.run_items = args.m * format::tile_count(args.n);
  return plan;
}

void run(const GemmPlan& plan, void*, int64_t begin, int64_t end) {
  const GemmArgs& args = plan.args;
  const int64_t tiles = format::tile_count(args.n);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t m = item / tiles;
    const Tile tile = tile_of(args, item % tiles);
    const uint8_t* x = args.x + m * args.x_stride;
    const float scale = row_scale(args, m);
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t n = tile.first_row + r;
      store_float(args.y, m * args.n + n, args.out,
                  finish(args, dot(tile, r, x, args.k), scale, n));
    }
  }
}

void prepare(const GemmPlan&, void*, int64_t, int64_t) {}

}  // namespace

const GemmConfig kGemmReference = {"reference", always_available, plan, prepare, run};

}  // namespace spense::cpu
