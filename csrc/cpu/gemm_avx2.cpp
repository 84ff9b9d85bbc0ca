// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C. An e4m3 byte moved into the exponent of a binary16 is its value times
// 2^-8, subnormals included; x carries the 2^8.
#include <immintrin.h>

#include "cpu/cpu_features.h"
#include "cpu/gemm_float.h"

namespace spense::cpu {
namespace {

// For each metadata byte (two groups, eight columns): where each column's byte lies among the four
// kept ones, or 0x80 for a pruned column, as vpshufb wants it.
struct ExpandTable {
  alignas(64) uint8_t control[256][8];
  constexpr ExpandTable() : control() {
    for (int byte = 0; byte < 256; ++byte) {
      for (uint8_t& column : control[byte]) column = 0x80;
      for (int group = 0; group < 2; ++group) {
        const int nibble = (byte >> (4 * group)) & 0xF;
        for (int i = 0; i < 2; ++i) {
          control[byte][4 * group + ((nibble >> (2 * i)) & 3)] =
              static_cast<uint8_t>(2 * group + i);
        }
      }
    }
  }
};
constexpr ExpandTable kExpandTable;

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr float kXFactor = 0x1p8f;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec madd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

  static __m128i load16(const uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static __m128i control(uint8_t metadata) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandTable.control[metadata]));
  }

  static void convert16(__m128i bytes, float* out) {
    const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7),
                                            _mm256_set1_epi16(static_cast<short>(0xBF80)));
    store(out, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
    store(out + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
  }

  static void decode(const uint8_t* unit, bool is_sparse, int row, float* out) {
    if (!is_sparse) {
      for (int j = 0; j < kDenseUnitColumns; j += 16) {
        convert16(load16(unit + format::value_offset(row, j)), out + j);
      }
      return;
    }
    const __m128i second = _mm_set1_epi64x(0x0404040404040404);  // of the two bytes of metadata
    for (int k = 0; k < kSparseUnitColumns; k += 32) {
      __m128i kept = load16(unit + format::value_offset(row, k / 2));
      const uint8_t* metadata = unit + format::metadata_offset(row, k);
      for (int i = 0; i < 4; i += 2) {
        const __m128i places = _mm_unpacklo_epi64(control(metadata[i]),
                                                  _mm_add_epi8(control(metadata[i + 1]), second));
        convert16(_mm_shuffle_epi8(kept, places), out + k + 8 * i);
        kept = _mm_srli_si128(kept, 8);
      }
    }
  }
};

}  // namespace

const GemmConfig kGemmAvx2 = {"avx2", has_avx2, FloatGemm<Avx2>::plan, FloatGemm<Avx2>::prepare,
                              FloatGemm<Avx2>::run};

}  // namespace spense::cpu
