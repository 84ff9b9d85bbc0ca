// SPDX-License-Identifier: Apache-2.0
// Descriptors of tcgen05 on e4m3 operands in shared memory, float32 sums in tensor memory. The
// layouts are CuTe's K-major 128-byte swizzle; tests compare every descriptor with CuTe's.
#pragma once

#include <cstdint>

#include "format/tile_stream.h"

namespace spense::sm100 {

inline constexpr uint64_t kDescriptorVersion = uint64_t{1} << 46;

// An operand: rows 128 bytes apart, groups of eight rows 1024 bytes apart. `smem` may point at any
// multiple of 16 bytes inside a row of a slot.
SPENSE_HD constexpr uint64_t operand(uint32_t smem) {
  constexpr uint64_t kLeading = uint64_t{1} << 16;  // not used with a swizzle
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kSwizzle128 = uint64_t{2} << 61;
  return ((smem & 0x3FFFF) >> 4) | kLeading | kEightRows | kDescriptorVersion | kSwizzle128;
}

// Metadata of 128 columns of a unit: 16 bytes a row, eight rows 128 bytes apart, no swizzle.
SPENSE_HD constexpr uint64_t metadata_block(uint32_t smem) {
  constexpr uint64_t kLeading = uint64_t{format::kMetadataRowBytes >> 4} << 16;  // one row wide
  constexpr uint64_t kEightRows = uint64_t{8 * format::kMetadataRowBytes >> 4} << 32;
  return ((smem & 0x3FFFF) >> 4) | kLeading | kEightRows | kDescriptorVersion;
}

// What an instruction multiplies: rows of all CTAs x tokens, e4m3 from K-major operands, float32.
SPENSE_HD constexpr uint32_t instruction(int rows, int tokens, bool sparse) {
  constexpr uint32_t kFloat32Sums = 1u << 4;
  return (sparse ? 1u << 2 : 0u) | kFloat32Sums | static_cast<uint32_t>(tokens >> 3) << 17 |
         static_cast<uint32_t>(rows >> 4) << 24;
}

// Instruction i of a unit, i = 0..3. Descriptor steps count 16 bytes: 32 value bytes of a row each,
// and of x 32 columns, or 64 where the weights are sparse.
inline constexpr int kInstructions = 4;
SPENSE_HD constexpr uint32_t w_step(int i) { return static_cast<uint32_t>(i) * 32 >> 4; }
SPENSE_HD constexpr uint32_t dense_x_step(int i) { return static_cast<uint32_t>(i) * 32 >> 4; }
SPENSE_HD constexpr uint32_t sparse_x_step(int i) { return static_cast<uint32_t>(i % 2) * 64 >> 4; }
// Columns of its metadata in the slot: 64 logical columns are 8 bytes a row.
SPENSE_HD constexpr uint32_t metadata_step(int i) { return static_cast<uint32_t>(i) * 2; }

}  // namespace spense::sm100
