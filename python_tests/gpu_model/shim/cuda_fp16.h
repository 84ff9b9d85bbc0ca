// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
  __half() = default;
  __half(const __half&) = default;
  __half& operator=(const __half& o) {
    model::note_store(this, sizeof *this);
    value = o.value;
    return *this;
  }
};
inline __half __float2half_rn(float v) {
  __half result;
  result.value = static_cast<_Float16>(v);
  return result;
}
struct __half2 {
  _Float16 low, high;
};
inline __half2 __floats2half2_rn(float low, float high) {
  return {static_cast<_Float16>(low), static_cast<_Float16>(high)};
}
