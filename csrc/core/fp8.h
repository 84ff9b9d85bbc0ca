// SPDX-License-Identifier: Apache-2.0
// e4m3 (sign, 4 exponent bits with bias 7, 3 mantissa bits; no infinity; 0x7F and 0xFF are NaN),
// bfloat16 and binary16 by bit arithmetic. Conversions down round to nearest even.
// Everything has internal linkage: files built for other instruction sets include this too.
#pragma once

#include <bit>
#include <cstdint>

#include "core/types.h"

namespace spense {
namespace {

inline constexpr uint8_t kE4m3Nan = 0x7F;
inline constexpr uint8_t kE4m3MaxByte = 0x7E;
inline constexpr float kE4m3Max = 448.0f;

[[maybe_unused]] constexpr bool is_e4m3_nan(uint8_t byte) { return (byte & 0x7F) == kE4m3Nan; }

[[maybe_unused]] constexpr float e4m3_to_float(uint8_t byte) {
  const uint32_t magnitude = byte & 0x7F;
  float value = 0.0f;
  if (magnitude == kE4m3Nan) {
    value = std::bit_cast<float>(0x7FC00000u);
  } else if (magnitude < 8) {
    value = static_cast<float>(magnitude) * 0x1p-9f;
  } else {
    value = std::bit_cast<float>((magnitude << 20) + (120u << 23));
  }
  return byte & 0x80 ? -value : value;
}

// Saturates at +-448. NaN gives 0x7F.
[[maybe_unused]] constexpr uint8_t e4m3_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint8_t sign = static_cast<uint8_t>((bits >> 24) & 0x80u);
  if (magnitude > 0x7F800000u) return kE4m3Nan;
  if (magnitude >= 0x43E00000u) return sign | kE4m3MaxByte;  // >= 448
  if (magnitude < 0x3C800000u) {                             // < 2^-6: multiples of 2^-9
    const float shifted = std::bit_cast<float>(magnitude) + 0x1p14f;
    return sign | static_cast<uint8_t>(std::bit_cast<uint32_t>(shifted) & 0x0Fu);
  }
  const uint32_t rounded = magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u);
  return sign | static_cast<uint8_t>((rounded >> 20) - (120u << 3));
}

[[maybe_unused]] constexpr float bf16_to_float(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

[[maybe_unused]] constexpr uint16_t bf16_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

[[maybe_unused]] constexpr float fp16_to_float(uint16_t value) {
  const uint32_t magnitude = value & 0x7FFFu;
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  uint32_t bits = 0;
  if (magnitude >= 0x7C00u) {
    bits = 0x7F800000u | ((magnitude & 0x3FFu) << 13);
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + (112u << 23);
  } else {
    bits = std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  }
  return std::bit_cast<float>(bits | sign);
}

// Overflows to infinity, as a cast in torch does.
[[maybe_unused]] constexpr uint16_t fp16_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7F800000u) return 0x7E00;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00;  // >= 65520
  if (magnitude < 0x38800000u) {                       // < 2^-14: multiples of 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - 0x3F000000u);
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10));
}

[[maybe_unused]] constexpr float load_float(const void* data, int64_t index, FloatType type) {
  switch (type) {
    case FloatType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(data)[index]);
    case FloatType::kFloat16:
      return fp16_to_float(static_cast<const uint16_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

[[maybe_unused]] constexpr void store_float(void* data, int64_t index, FloatType type,
                                            float value) {
  switch (type) {
    case FloatType::kBFloat16:
      static_cast<uint16_t*>(data)[index] = bf16_from_float(value);
      break;
    case FloatType::kFloat16:
      static_cast<uint16_t*>(data)[index] = fp16_from_float(value);
      break;
    default:
      static_cast<float*>(data)[index] = value;
  }
}

static_assert(e4m3_from_float(448.0f) == 0x7E && e4m3_from_float(-1000.0f) == 0xFE);
static_assert(e4m3_from_float(0x1p-10f) == 0 && e4m3_from_float(0x1.8p-9f) == 2);
static_assert(e4m3_to_float(0x08) == 0x1p-6f && e4m3_to_float(0x87) == -7 * 0x1p-9f);
static_assert(fp16_from_float(65520.0f) == 0x7C00 && fp16_from_float(0x1p-24f) == 1);
static_assert(bf16_from_float(1.00390625f) == 0x3F80);

}  // namespace
}  // namespace spense
