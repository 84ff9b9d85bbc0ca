// SPDX-License-Identifier: Apache-2.0
// One value at a time.
#include "cpu/neighbours_loops.h"

namespace spense::cpu {
namespace {

struct Row {
  static uint32_t amax_bits(const void* x, int64_t k, InType type) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(load_float(x, i, type)) & 0x7FFFFFFFu;
      if (bits > largest) largest = bits;
    }
    return largest;
  }

  static void convert(const void* x, int64_t k, InType type, float inverse, uint8_t* y) {
    for (int64_t i = 0; i < k; ++i) y[i] = e4m3_from_float(load_float(x, i, type) * inverse);
  }
};

}  // namespace

const QuantizeConfig kQuantizeReference = {"reference", quantize_always_available,
                                           quantize_rows<Row>, norm_rows<Row>, gated_rows<Row>};

}  // namespace spense::cpu
