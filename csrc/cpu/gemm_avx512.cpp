// SPDX-License-Identifier: Apache-2.0
// AVX-512 with byte permutes, byte expand and bf16 dot products. e4m3 is exact in bf16, products of
// two e4m3 values are exact in float32, sums are float32.
#include <new>

#include "cpu/avx512_narrow.h"
#include "cpu/avx512_wide.h"
#include "cpu/cpu_features.h"

namespace spense::cpu {
namespace {

enum Kind : int { kNarrow, kWide };

// An item is (m_block, tile, row_block), the last running fastest.
struct Item {
  Tile tile;
  int row;
  int64_t m, m_count;

  Item(const GemmPlan& plan, int64_t index) {
    const int64_t row_blocks = kTileRows / plan.row_block;
    const int64_t tiles = format::tile_count(plan.args.n);
    row = static_cast<int>(index % row_blocks * plan.row_block);
    tile = tile_of(plan.args, index / row_blocks % tiles);
    m = index / row_blocks / tiles * plan.m_block;
    m_count = min64(plan.m_block, plan.args.m - m);
  }
  bool empty() const { return row >= tile.rows; }
};

GemmPlan plan(const GemmArgs& args, int threads) {
  GemmPlan plan;
  plan.args = args;
  plan.threads = threads;
  plan.kind = args.m <= kNarrowMax ? kNarrow : kWide;
  const bool narrow = plan.kind == kNarrow;
  plan.workspace_bytes = narrow ? NarrowX::bytes(args) : WideX::bytes(args);
  cut_prepare(plan, args.m, args.k);
  // A narrow item makes as many passes as it needs; the weights then come from L2.
  plan.m_block = narrow ? kNarrowMax : kWideMBlock;
  plan.row_block = narrow ? kNarrowRowBlock : kWideRowBlock;
  const auto items = [&] {
    return format::tile_count(args.n) * (kTileRows / plan.row_block) *
           format::ceil_div(args.m, plan.m_block);
  };
  if (narrow) {
    while (plan.row_block > 16 && items() < 8 * threads) plan.row_block /= 2;
  } else {
    while (plan.m_block > 64 && items() < 4 * threads) plan.m_block /= 2;
  }
  plan.run_items = items();
  return plan;
}

void prepare(const GemmPlan& plan, void* workspace, int64_t begin, int64_t end) {
  const int64_t last = min64(end * plan.prepare_block, plan.args.m);
  for (int64_t m = begin * plan.prepare_block; m < last; ++m) {
    if (plan.kind == kNarrow) {
      prepare_narrow(plan.args, NarrowX(plan.args, workspace), m);
    } else {
      prepare_wide(plan.args, WideX(plan.args, workspace), m);
    }
  }
}

using NarrowKernel = void (*)(const GemmArgs&, const NarrowX&, int64_t, const Tile&, int, int,
                              const uint8_t*);
constexpr NarrowKernel kNarrowKernels[kNarrowPass] = {run_narrow<1>, run_narrow<2>, run_narrow<3>,
                                                      run_narrow<4>, run_narrow<5>, run_narrow<6>,
                                                      run_narrow<7>, run_narrow<8>};

void run_narrow_items(const GemmPlan& plan, void* workspace, int64_t begin, int64_t end) {
  const NarrowX x(plan.args, workspace);
  const int64_t passes = format::ceil_div(plan.args.m, kNarrowPass);
  for (int64_t i = begin; i < end; ++i) {
    const Item item(plan, i), following(plan, i + 1 < end ? i + 1 : i);
    // Shifted so that the current rows' addresses in it are those of the following item's rows.
    const uint8_t* next = following.tile.bytes + (following.row - item.row) * kRowBytes;
    if (item.empty()) continue;
    for (int64_t p = 0; p < passes; ++p) {
      const int64_t m0 = plan.args.m * p / passes, m1 = plan.args.m * (p + 1) / passes;
      kNarrowKernels[m1 - m0 - 1](plan.args, x, m0, item.tile, item.row,
                                  static_cast<int>(plan.row_block), next);
    }
  }
}

void run_wide_items(const GemmPlan& plan, void* workspace, int64_t begin, int64_t end) {
  const WideX x(plan.args, workspace);
  WideScratch* scratch = new WideScratch;
  for (int64_t i = begin; i < end; ++i) {
    const Item item(plan, i);
    if (item.empty()) continue;
    run_wide(plan.args, x, item.tile, item.row, item.m, item.m_count, *scratch);
  }
  delete scratch;
}

void run(const GemmPlan& plan, void* workspace, int64_t begin, int64_t end) {
  plan.kind == kNarrow ? run_narrow_items(plan, workspace, begin, end)
                       : run_wide_items(plan, workspace, begin, end);
}

}  // namespace

const GemmConfig kGemmAvx512 = {"avx512", has_avx512, plan, prepare, run};

}  // namespace spense::cpu
