// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(const __nv_bfloat16&) = default;
  __nv_bfloat16& operator=(const __nv_bfloat16& o) {
    model::note_store(this, sizeof *this);
    bits = o.bits;
    return *this;
  }
};
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t b = std::bit_cast<uint32_t>(v);
  __nv_bfloat16 result;
  result.bits = static_cast<uint16_t>((b + 0x7FFF + (b >> 16 & 1)) >> 16);
  return result;
}
struct __nv_bfloat162 {
  uint16_t low, high;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low).bits, __float2bfloat16_rn(high).bits};
}
