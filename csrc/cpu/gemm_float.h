// SPDX-License-Identifier: Apache-2.0
// Hybrid GEMM in float32 arithmetic, written once for every instruction set without bf16 dot
// products. An item is (tile, row_block rows of it, m_block rows of x). For each unit it decodes
// the item's weights to float once and multiplies them with all rows of x:
//
//   narrow (few rows of x): dot products along K, x as [m][padded k]
//   wide:                   one lane a row of x, x as [m / kGroup][padded k][kGroup]
//
// `Isa` brings the vector type and the decoder:
//   Vec, kLanes          float vector; zero(), load(p), store(p, v), broadcast(p), madd(a, b, c)
//   sum_rows(v, out)     out[i] = sum of v[i][0] and v[i][1], for four rows
//   kXFactor             power of two that x is multiplied with, because decode() leaves it out
//   decode(unit, is_sparse, row, out)   a row of a unit, pruned zeros written out
//   kFused               up to so many rows of x, dot_row<m>() replaces decode() and narrow()
// Everything has internal linkage, because it is compiled once for each instruction set.
#pragma once

#include "cpu/gemm_common.h"

namespace spense::cpu {
namespace {

template <typename Isa>
struct FloatGemm {
  using Vec = typename Isa::Vec;
  static constexpr int kGroup = 2 * Isa::kLanes;  // rows of x side by side
  static constexpr int kRows = 4;                 // weight rows in registers
  static constexpr int64_t kRowBlock = 32, kMBlock = 256;
  enum Kind : int { kNarrow, kWide };

  struct Scratch {
    alignas(64) float weights[kRowBlock][kSparseUnitColumns];
    alignas(64) float acc[kRowBlock][kMBlock];
  };

  static int64_t padded_m(const GemmPlan& plan) {
    return plan.kind == kWide ? format::ceil_div(plan.args.m, kGroup) * kGroup : plan.args.m;
  }
  static float* packed_x(void* workspace) { return static_cast<float*>(workspace); }
  static float* scales(const GemmPlan& plan, void* workspace) {
    return packed_x(workspace) + padded_m(plan) * format::padded_k(plan.args.k);
  }

  static GemmPlan plan(const GemmArgs& args, int threads) {
    GemmPlan plan;
    plan.args = args;
    plan.threads = threads;
    plan.kind = args.m < kGroup ? kNarrow : kWide;
    plan.workspace_bytes = (padded_m(plan) * format::padded_k(args.k) + args.m) * sizeof(float);
    const int group = plan.kind == kWide ? kGroup : 1;
    cut_prepare(plan, format::ceil_div(args.m, group), args.k * group);
    plan.m_block = kMBlock;
    plan.row_block = kRowBlock;
    const int64_t m_blocks = format::ceil_div(args.m, plan.m_block);
    const auto items = [&] {
      return format::tile_count(args.n) * (kTileRows / plan.row_block) * m_blocks;
    };
    while (plan.row_block > 2 * kRows && items() < 4 * threads) plan.row_block /= 2;
    plan.run_items = items();
    return plan;
  }

  static void prepare(const GemmPlan& plan, void* workspace, int64_t begin, int64_t end) {
    const GemmArgs& args = plan.args;
    const int64_t k_padded = format::padded_k(args.k);
    const int rows = plan.kind == kWide ? kGroup : 1;
    const int64_t last = min64(end * plan.prepare_block, format::ceil_div(args.m, rows));
    for (int64_t group = begin * plan.prepare_block; group < last; ++group) {
      float* out = packed_x(workspace) + group * rows * k_padded;
      for (int i = 0; i < rows; ++i) {
        const int64_t m = group * rows + i;
        const uint8_t* x = m < args.m ? args.x + m * args.x_stride : nullptr;
        for (int64_t k = 0; k < k_padded; ++k) {
          out[k * rows + i] =
              x != nullptr && k < args.k ? e4m3_to_float(x[k]) * Isa::kXFactor : 0.0f;
        }
        if (x != nullptr) scales(plan, workspace)[m] = row_scale(args, m);
      }
    }
  }

  // acc[r][m] += weights[r] . x[m] over `columns` columns, for one row of x.
  static void narrow(Scratch& s, int64_t rows, int64_t m, const float* x, int columns) {
    for (int64_t r = 0; r < rows; r += kRows) {
      Vec sum[kRows][2];
      for (auto& row : sum) row[0] = row[1] = Isa::zero();
      for (int k = 0; k < columns; k += kGroup) {
        const Vec x0 = Isa::load(x + k), x1 = Isa::load(x + k + Isa::kLanes);
        for (int i = 0; i < kRows; ++i) {
          const float* w = s.weights[r + i] + k;
          sum[i][0] = Isa::madd(Isa::load(w), x0, sum[i][0]);
          sum[i][1] = Isa::madd(Isa::load(w + Isa::kLanes), x1, sum[i][1]);
        }
      }
      float totals[kRows];
      Isa::sum_rows(sum, totals);
      for (int i = 0; i < kRows; ++i) s.acc[r + i][m] += totals[i];
    }
  }

  // acc[r][0 ...] += all rows of the item times the m_count rows of x.
  static void fused(const GemmPlan& plan, Scratch& s, const Tile& tile, int64_t u, int r0,
                    int64_t m_count, const float* x) {
    if constexpr (Isa::kFused > 0) {
      static_assert(Isa::kFused == 4);
      using DotRow = void (*)(const uint8_t*, bool, int, const float*, int64_t, float*);
      constexpr DotRow kDotRows[] = {Isa::template dot_row<1>, Isa::template dot_row<2>,
                                     Isa::template dot_row<3>, Isa::template dot_row<4>};
      for (int r = 0; r < plan.row_block; ++r) {
        kDotRows[m_count - 1](tile.unit(u), tile.is_sparse(u), r0 + r, x,
                              format::padded_k(plan.args.k), s.acc[r]);
      }
    }
  }

  // The same for kGroup rows of x, starting at m.
  static void wide(Scratch& s, int64_t rows, int64_t m, const float* x, int columns) {
    for (int64_t r = 0; r < rows; r += kRows) {
      Vec sum[kRows][2];
      for (int i = 0; i < kRows; ++i) {
        sum[i][0] = Isa::load(&s.acc[r + i][m]);
        sum[i][1] = Isa::load(&s.acc[r + i][m + Isa::kLanes]);
      }
      for (int k = 0; k < columns; ++k) {
        const Vec x0 = Isa::load(x + k * kGroup), x1 = Isa::load(x + k * kGroup + Isa::kLanes);
        for (int i = 0; i < kRows; ++i) {
          const Vec w = Isa::broadcast(&s.weights[r + i][k]);
          sum[i][0] = Isa::madd(w, x0, sum[i][0]);
          sum[i][1] = Isa::madd(w, x1, sum[i][1]);
        }
      }
      for (int i = 0; i < kRows; ++i) {
        Isa::store(&s.acc[r + i][m], sum[i][0]);
        Isa::store(&s.acc[r + i][m + Isa::kLanes], sum[i][1]);
      }
    }
  }

  static void run(const GemmPlan& plan, void* workspace, int64_t begin, int64_t end) {
    const GemmArgs& args = plan.args;
    const int64_t k_padded = format::padded_k(args.k);
    const int64_t row_blocks = kTileRows / plan.row_block;
    const int64_t tile_items = format::tile_count(args.n) * row_blocks;
    const int group = plan.kind == kWide ? kGroup : 1;
    Scratch s;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t m0 = item / tile_items * plan.m_block;
      const int64_t m_count = min64(plan.m_block, args.m - m0);
      const Tile tile = tile_of(args, item % tile_items / row_blocks);
      const int64_t r0 = item % row_blocks * plan.row_block;
      for (auto& row : s.acc) {
        for (float& value : row) value = 0.0f;
      }
      for (int64_t u = 0; u < tile.units() && r0 < tile.rows; ++u) {
        const int columns = tile.is_sparse(u) ? kSparseUnitColumns : kDenseUnitColumns;
        if (plan.kind == kNarrow && m_count <= Isa::kFused) {
          fused(plan, s, tile, u, static_cast<int>(r0), m_count,
                packed_x(workspace) + m0 * k_padded + tile.column(u));
          continue;
        }
        for (int64_t r = 0; r < plan.row_block; ++r) {
          Isa::decode(tile.unit(u), tile.is_sparse(u), static_cast<int>(r0 + r), s.weights[r]);
        }
        for (int64_t m = 0; m < m_count; m += group) {
          const float* x = packed_x(workspace) + (m0 + m) * k_padded + tile.column(u) * group;
          plan.kind == kWide ? wide(s, plan.row_block, m, x, columns)
                             : narrow(s, plan.row_block, m, x, columns);
        }
      }
      for (int64_t m = 0; m < m_count; ++m) {
        const float scale = scales(plan, workspace)[m0 + m];
        for (int64_t r = 0; r < min64(plan.row_block, tile.rows - r0); ++r) {
          const int64_t n = tile.first_row + r0 + r;
          store_float(args.y, (m0 + m) * args.n + n, args.out, finish(args, s.acc[r][m], scale, n));
        }
      }
    }
  }
};

}  // namespace
}  // namespace spense::cpu
