// SPDX-License-Identifier: Apache-2.0
// For any CPU: four-float vectors of the compiler, weights decoded through a table.
#include <cstring>

#include "cpu/gemm_float.h"

namespace spense::cpu {
namespace {

struct E4m3Table {
  float value[256];
  constexpr E4m3Table() : value() {
    for (int byte = 0; byte < 256; ++byte) value[byte] = e4m3_to_float(static_cast<uint8_t>(byte));
  }
};
constexpr E4m3Table kTable;

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr float kXFactor = 1.0f;
  static constexpr int kFused = 0;

  static Vec zero() { return Vec{}; }
  static Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
  static Vec broadcast(const float* p) { return Vec{*p, *p, *p, *p}; }
  static Vec madd(Vec a, Vec b, Vec c) { return a * b + c; }
  static void sum_rows(const Vec v[4][2], float* out) {
    for (int i = 0; i < 4; ++i) {
      const Vec lanes = v[i][0] + v[i][1];
      out[i] = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    }
  }

  static void decode(const uint8_t* unit, bool is_sparse, int row, float* out) {
    if (!is_sparse) {
      for (int j = 0; j < kDenseUnitColumns; j += 16) {
        const uint8_t* bytes = unit + format::value_offset(row, j);
        for (int i = 0; i < 16; ++i) out[j + i] = kTable.value[bytes[i]];
      }
      return;
    }
    std::memset(out, 0, kSparseUnitColumns * sizeof(float));
    for (int k = 0; k < kSparseUnitColumns; k += 32) {
      const uint8_t* bytes = unit + format::value_offset(row, k / 2);
      const uint8_t* metadata = unit + format::metadata_offset(row, k);
      for (int group = 0; group < 8; ++group) {
        const int nibble = (metadata[group / 2] >> (4 * (group % 2))) & 0xF;
        out[k + 4 * group + (nibble & 3)] = kTable.value[bytes[2 * group]];
        out[k + 4 * group + (nibble >> 2)] = kTable.value[bytes[2 * group + 1]];
      }
    }
  }
};

}  // namespace

const GemmConfig kGemmPortable = {"portable", always_available, FloatGemm<Portable>::plan,
                                  FloatGemm<Portable>::prepare, FloatGemm<Portable>::run};

}  // namespace spense::cpu
