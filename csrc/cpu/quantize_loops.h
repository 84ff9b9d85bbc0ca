// SPDX-License-Identifier: Apache-2.0
// amax and conversion as straight loops over small blocks, free of branches, so that compilers
// vectorise them for the instruction set at hand. Each step is exact or rounds as IEEE says: the
// bytes are those of quantize_reference.cpp.
#pragma once

#include "cpu/quantize_common.h"

namespace spense::cpu {
namespace {

struct VectorLoops {
  static constexpr int kBlock = 256;

  // With masks: compilers do not take float arithmetic out of a conditional.
  static int32_t choose(bool condition, int32_t yes, int32_t no) {
    const int32_t mask = -static_cast<int32_t>(condition);
    return (yes & mask) | (no & ~mask);
  }
  static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

  // NaN and infinity keep magnitudes >= kInfinityBits.
  template <int kType>
  static void load_bits(const void* x, int64_t first, int count, uint32_t* bits) {
    if constexpr (kType == static_cast<int>(InType::kFloat32)) {
      std::memcpy(bits, static_cast<const uint32_t*>(x) + first, count * sizeof(uint32_t));
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(x) + first;
      for (int i = 0; i < count; ++i) {
        const uint32_t h = from[i];
        if constexpr (kType == static_cast<int>(InType::kBFloat16)) {
          bits[i] = h << 16;
        } else {
          const int32_t half = static_cast<int32_t>(h & 0x7FFFu);
          const int32_t small = std::bit_cast<int32_t>(static_cast<float>(half) * 0x1p-24f);
          const int32_t normal = (half << 13) + (112 << 23);
          const int32_t magnitude = choose(half < 0x400, small, normal);
          const int32_t special = choose(half >= 0x7C00, kInfinityBits, 0);
          bits[i] = static_cast<uint32_t>(magnitude | special) | ((h & 0x8000u) << 16);
        }
      }
    }
  }

  static void convert_bits(const uint32_t* bits, int count, float inverse, uint8_t* y) {
    for (int i = 0; i < count; ++i) {
      const uint32_t product = std::bit_cast<uint32_t>(std::bit_cast<float>(bits[i]) * inverse);
      const int32_t magnitude = static_cast<int32_t>(product & 0x7FFFFFFFu);
      const float shifted = std::bit_cast<float>(magnitude) + 0x1p14f;
      const int32_t small = std::bit_cast<int32_t>(shifted) & 0xF;
      const int32_t normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
      const int32_t byte = smaller(choose(magnitude < 0x3C800000, small, normal), kE4m3MaxByte);
      y[i] = static_cast<uint8_t>(byte | static_cast<int32_t>((product >> 24) & 0x80u));
    }
  }

  template <int kType>
  static uint32_t amax_of(const void* x, int64_t k) {
    uint32_t bits[kBlock];
    int32_t largest = 0;
    for (int64_t first = 0; first < k; first += kBlock) {
      const int count = k - first < kBlock ? static_cast<int>(k - first) : kBlock;
      load_bits<kType>(x, first, count, bits);
      for (int i = 0; i < count; ++i) {
        const int32_t magnitude = static_cast<int32_t>(bits[i] & 0x7FFFFFFFu);
        largest = magnitude > largest ? magnitude : largest;
      }
    }
    return static_cast<uint32_t>(largest);
  }

  template <int kType>
  static void convert_all(const void* x, int64_t k, float inverse, uint8_t* y) {
    uint32_t bits[kBlock];
    for (int64_t first = 0; first < k; first += kBlock) {
      const int count = k - first < kBlock ? static_cast<int>(k - first) : kBlock;
      load_bits<kType>(x, first, count, bits);
      convert_bits(bits, count, inverse, y + first);
    }
  }

  static uint32_t amax_bits(const void* x, int64_t k, InType type) {
    switch (type) {
      case InType::kBFloat16:
        return amax_of<0>(x, k);
      case InType::kFloat16:
        return amax_of<1>(x, k);
      default:
        return amax_of<2>(x, k);
    }
  }

  static void convert(const void* x, int64_t k, InType type, float inverse, uint8_t* y) {
    switch (type) {
      case InType::kBFloat16:
        return convert_all<0>(x, k, inverse, y);
      case InType::kFloat16:
        return convert_all<1>(x, k, inverse, y);
      default:
        return convert_all<2>(x, k, inverse, y);
    }
  }
};

}  // namespace
}  // namespace spense::cpu
