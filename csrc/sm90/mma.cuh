// SPDX-License-Identifier: Apache-2.0
// wgmma on e4m3 operands in shared memory: 64 weight rows x kTokens, float32 sums in registers.
// The instructions are CuTe's atoms; this file chooses one by kTokens and spreads the array.
#pragma once

#include <cstdint>
#if SPENSE_EXTENDED_TILES  // of an instance with another width than CuTe's usual ones: slow to read
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#endif
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_sparse.hpp>
#include <utility>

namespace spense::sm90 {

template <int kTokens>
struct Atoms;

#define SPENSE_ATOMS(N)                                                            \
  template <>                                                                      \
  struct Atoms<N> {                                                                \
    using Dense = cute::SM90::GMMA::MMA_64x##N##x32_F32E4M3E4M3_SS_TN<>;           \
    using Sparse = cute::SM90::GMMA::SPARSE::GMMA_64x##N##x64_F32E4M3E4M3_SS_TN<>; \
  };
SPENSE_ATOMS(16)
SPENSE_ATOMS(32)
SPENSE_ATOMS(64)
SPENSE_ATOMS(128)
#if SPENSE_EXTENDED_TILES
SPENSE_ATOMS(88)
SPENSE_ATOMS(176)
#endif
SPENSE_ATOMS(256)
#undef SPENSE_ATOMS

// Sums of a warpgroup's parts, to zero.
template <int kParts, int kSums>
__device__ __forceinline__ void clear(float (&sums)[kParts][kSums]) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[part][i] = 0;
  }
}

// Descriptor of a K-major operand with the 128-byte swizzle: rows 128 bytes apart, groups of eight
// rows 1024 bytes apart. `address` may point at any multiple of 16 bytes inside a row.
__device__ __forceinline__ uint64_t operand(uint32_t address) {
  constexpr uint64_t kLeading = uint64_t{1} << 16;  // not used with a swizzle
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return ((address & 0x3FFFF) >> 4) | kLeading | kEightRows | kSwizzle128;
}

// sums = w * x (+ sums when accumulate), 32 columns.
template <int kTokens>
__device__ __forceinline__ void mma_dense(float (&sums)[kTokens / 2], uint64_t w, uint64_t x,
                                          bool accumulate) {
  const auto scale =
      accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
  [&]<size_t... i>(std::index_sequence<i...>) {
    Atoms<kTokens>::Dense::fma(w, x, sums[i]..., scale);
  }(std::make_index_sequence<kTokens / 2>{});
}

// The same with 2:4 sparse weights, 64 logical columns. The metadata register is read while the
// instruction runs: it must stay until the group is waited for.
template <int kTokens>
__device__ __forceinline__ void mma_sparse(float (&sums)[kTokens / 2], uint64_t w, uint64_t x,
                                           uint32_t metadata, bool accumulate) {
  const auto scale =
      accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
  [&]<size_t... i>(std::index_sequence<i...>) {
    Atoms<kTokens>::Sparse::fma(w, x, sums[i]..., metadata, scale);
  }(std::make_index_sequence<kTokens / 2>{});
}

}  // namespace spense::sm90
