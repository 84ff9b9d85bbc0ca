// SPDX-License-Identifier: Apache-2.0
// Takes the place of CuTe's atoms: those that the SM90 kernels use, on model::machine().
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "wgmma.h"

namespace cute::SM90::GMMA {

enum class ScaleOut { Zero = 0, One = 1 };

template <int kTokens>
struct DenseAtom {
  template <class... R>
  static void fma(uint64_t a, uint64_t b, R&&... rest) {
    static_assert(sizeof...(R) == kTokens / 2 + 1);
    const auto all = std::tie(rest...);
    [&]<size_t... i>(std::index_sequence<i...>) {
      model::wgmma(false, {&std::get<i>(all)...}, a, b, 0,
                   std::get<kTokens / 2>(all) == ScaleOut::One);
    }(std::make_index_sequence<kTokens / 2>{});
  }
};
template <int kTokens>
struct SparseAtom {
  template <class... R>
  static void fma(uint64_t a, uint64_t b, R&&... rest) {
    static_assert(sizeof...(R) == kTokens / 2 + 2);
    const auto all = std::tie(rest...);
    [&]<size_t... i>(std::index_sequence<i...>) {
      model::wgmma(true, {&std::get<i>(all)...}, a, b, std::get<kTokens / 2>(all),
                   std::get<kTokens / 2 + 1>(all) == ScaleOut::One);
    }(std::make_index_sequence<kTokens / 2>{});
  }
};

#define MODEL_ATOMS(N)                                      \
  template <class...>                                       \
  using MMA_64x##N##x32_F32E4M3E4M3_SS_TN = DenseAtom<N>;   \
  namespace SPARSE {                                        \
  template <class...>                                       \
  using GMMA_64x##N##x64_F32E4M3E4M3_SS_TN = SparseAtom<N>; \
  }
MODEL_ATOMS(8)
MODEL_ATOMS(16)
MODEL_ATOMS(32)
MODEL_ATOMS(64)
MODEL_ATOMS(88)
MODEL_ATOMS(96)
MODEL_ATOMS(128)
MODEL_ATOMS(176)
MODEL_ATOMS(256)
#undef MODEL_ATOMS

}  // namespace cute::SM90::GMMA
