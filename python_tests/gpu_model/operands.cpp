// SPDX-License-Identifier: Apache-2.0
// What the tensor cores of SM90 and SM100 have in common: K-major operands in shared memory, e4m3,
// 2:4 metadata.
#include <cmath>
#include <cstring>

#include "tensor_core.h"

namespace model {

// Eight rows make a group, `stride` bytes from the next. With the 128-byte swizzle a row of a group
// is 128 bytes and its 16-byte pieces are exchanged: address bits 4..6 ^= bits 7..9. Without, a
// group holds 16 bytes of each row, the next 16 are `leading` bytes further.
uint32_t Operand::address(int row, int byte) const {
  if (!swizzle128) return start + row / 8 * stride + byte / 16 * leading + row % 8 * 16 + byte % 16;
  const uint32_t linear = start + row / 8 * stride + row % 8 * 128 + byte;
  return linear ^ (linear >> 3 & 0x70);
}

float e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  if (exponent == 15 && fraction == 7) return std::nanf("");
  const float magnitude = exponent ? std::ldexp(8.0f + fraction, exponent - 10)
                                   : std::ldexp(static_cast<float>(fraction), -9);
  return bits & 0x80 ? -magnitude : magnitude;
}

std::vector<float> read_operand(Cta& cta, const Operand& operand, int rows, int bytes) {
  static const auto table = [] {
    std::array<float, 256> all;
    for (int i = 0; i < 256; ++i) all[i] = e4m3(static_cast<uint8_t>(i));
    return all;
  }();
  std::vector<float> values(rows * bytes);
  for (int row = 0; row < rows; ++row) {
    for (int byte = 0; byte < bytes; byte += 16) {
      const uint32_t at = operand.address(row, byte);
      for (int i = 0; i < 16; ++i) values[row * bytes + byte + i] = table[cta.smem.at(at + i)];
    }
  }
  return values;
}

void note_reads(Cta& cta, const Operand& operand, int rows, int bytes, std::vector<Granule*>& to,
                bool partly) {
  bool ended = false;  // behind the last row that is there
  for (int row = 0; row < rows; ++row) {
    for (int byte = 0; byte < bytes; byte += kGranule) {
      const uint32_t at = operand.address(row, byte);
      if (at % kGranule) fail("an operand begins at %#x, no multiple of 16", at);
      Granule& g = machine().granule(cta, at);
      if (g.copies) fail("offset %#x is read while a copy to it is under way", at);
      if (partly && row > 0 && byte == 0 && !g.filled) ended = true;
      if (g.filled == ended) fail("offset %#x is read and was never filled", at);
      g.used = true;
      ++g.readers;
      to.push_back(&g);
    }
  }
}

void decode_chunk(const uint8_t* row, int chunk, uint8_t* to) {
  const uint8_t nibble = chunk % 2 ? row[chunk / 2] >> 4 : row[chunk / 2] & 15;
  to[0] = nibble & 3;
  to[1] = nibble >> 2;
  if (to[0] >= to[1]) fail("metadata %#x is no ascending pair", nibble);
}

void read_columns(Cta& cta, const Operand& operand, int rows, int bytes, float* to, int step) {
  const auto values = read_operand(cta, operand, rows, bytes);
  for (int row = 0; row < rows; ++row) {
    for (int byte = 0; byte < bytes; ++byte) to[byte * step + row] = values[row * bytes + byte];
  }
}

// Products of small integers: every sum is exact, so that the order does not matter.
void multiply(float* sums, const float* values, const uint8_t* indices, int kept,
              const std::vector<float>& x, int tokens) {
  for (int j = 0; j < kept; ++j) {
    const float w = values[j];
    if (w == 0) continue;
    const float* column = &x[(indices ? j / 2 * 4 + indices[j] : j) * tokens];
    for (int n = 0; n < tokens; ++n) sums[n] += w * column[n];
  }
}

}  // namespace model
