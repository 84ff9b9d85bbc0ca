// SPDX-License-Identifier: Apache-2.0
// quantize_fp8 on rows; each instruction set brings its own `amax_bits` and `quantize_row`.
// Everything has internal linkage, because it is compiled once for each instruction set.
#pragma once

#include <cstring>

#include "core/fp8.h"
#include "cpu/quantize.h"

namespace spense::cpu {
namespace {

constexpr uint32_t kInfinityBits = 0x7F800000u;

template <typename T>
struct Buffer {
  explicit Buffer(int64_t count) : data(new T[count]) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { delete[] data; }
  T* data;
};
using Bytes = Buffer<uint8_t>;

// Eight at a time: a store a byte would make the compiler read the places one by one.
[[maybe_unused]] void gather_bytes(const uint8_t* from, const int32_t* places, int64_t count,
                                   uint8_t* to) {
  int64_t p = 0;
  for (; p + 8 <= count; p += 8) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; ++i) bytes[i] = from[places[p + i]];
    std::memcpy(to + p, bytes, sizeof bytes);
  }
  for (; p < count; ++p) to[p] = from[places[p]];
}

// Row holds
//   amax_bits(x, k, type): bits of the largest magnitude in float32; NaNs and infinities are
//                          >= kInfinityBits
//   convert(x, k, type, inverse, y): y[i] = e4m3(x[i] * inverse)
//
// Quantises x, one row of elements of `type`, as row m of args. `bytes` has room for k of them
// where there is a gather: rows are quantised in place and gathered as bytes, which costs less.
template <typename Row>
void quantize_row(const void* x, FloatType type, const QuantizeArgs& args, int64_t m,
                  uint8_t* bytes) {
  uint8_t* y = args.y + m * args.y_stride;
  const uint32_t amax_bits = Row::amax_bits(x, args.k, type);
  std::memset(y + args.k, 0, args.y_stride - args.k);
  if (amax_bits >= kInfinityBits) {
    args.scale[m] = __builtin_nanf("");
    std::memset(y, kE4m3Nan, args.k);
    return;
  }
  const float amax = std::bit_cast<float>(amax_bits);
  const float scale = (amax > 1e-12f ? amax : 1e-12f) * (1.0f / 448.0f);
  args.scale[m] = scale;
  uint8_t* target = args.gather ? bytes : y;
  Row::convert(x, args.k, type, 1.0f / scale, target);
  if (args.gather) gather_bytes(target, args.gather, args.k, y);
}

template <typename Row>
void quantize_rows(const QuantizeArgs& args, int64_t row_begin, int64_t row_end) {
  const Bytes bytes(args.gather ? args.k : 0);
  for (int64_t m = row_begin; m < row_end; ++m) {
    const char* x = static_cast<const char*>(args.x) + m * args.x_stride * bytes_of(args.in);
    quantize_row<Row>(x, args.in, args, m, bytes.data);
  }
}

[[maybe_unused]] bool quantize_always_available() { return true; }

}  // namespace
}  // namespace spense::cpu
