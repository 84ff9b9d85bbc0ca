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

  static void sum_rows(const Vec v[4][2], float* out) {
    Vec row[4];
    for (int i = 0; i < 4; ++i) row[i] = _mm256_add_ps(v[i][0], v[i][1]);
    const Vec pairs =
        _mm256_hadd_ps(_mm256_hadd_ps(row[0], row[1]), _mm256_hadd_ps(row[2], row[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  }

  static __m128i load16(const uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static __m128i control(uint8_t metadata) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandTable.control[metadata]));
  }

  // Calls use(column, v0, v1) for every 16 columns of a row, pruned zeros in place.
  template <typename Use>
  __attribute__((always_inline)) static inline void for_each_16(const uint8_t* unit, bool is_sparse,
                                                                int row, Use use) {
    const auto convert = [&](int column, __m128i bytes) __attribute__((always_inline)) {
      const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7),
                                              _mm256_set1_epi16(static_cast<short>(0xBF80)));
      use(column, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
    };
    const uint8_t* values = unit + row * kRowBytes;
    const unsigned swizzle = static_cast<unsigned>(row % 8) * 16;
    if (!is_sparse) {
      for (unsigned j = 0; j < kDenseUnitColumns; j += 16)
        convert(j, load16(values + (j ^ swizzle)));
      return;
    }
    const __m128i second = _mm_set_epi64x(0x0404040404040404, 0);
    const uint8_t* metadata = unit + format::metadata_offset(row, 0);
    for (unsigned k = 0; k < kSparseUnitColumns; k += 32) {
      if (k == kSparseUnitColumns / 2) metadata = unit + format::metadata_offset(row, k) - k / 8;
      const __m128i kept = load16(values + (k / 2 ^ swizzle));
      const uint8_t* m = metadata + k / 8;
      const __m128i low = _mm_unpacklo_epi64(control(m[0]), control(m[1]));
      const __m128i high = _mm_unpacklo_epi64(control(m[2]), control(m[3]));
      convert(k, _mm_shuffle_epi8(kept, _mm_add_epi8(low, second)));
      convert(k + 16, _mm_shuffle_epi8(_mm_srli_si128(kept, 8), _mm_add_epi8(high, second)));
    }
  }

  static void decode(const uint8_t* unit, bool is_sparse, int row, float* out) {
    for_each_16(unit, is_sparse, row, [&](int column, Vec v0, Vec v1) {
      store(out + column, v0);
      store(out + column + 8, v1);
    });
  }

  // out[m] += the row times kM rows of x, without a detour through memory.
  static constexpr int kFused = 4;
  template <int kM>
  static void dot_row(const uint8_t* unit, bool is_sparse, int row, const float* x,
                      int64_t x_stride, float* out) {
    Vec sum[kM][2];
    for (auto& pair : sum) pair[0] = pair[1] = zero();
    for_each_16(unit, is_sparse, row, [&](int column, Vec v0, Vec v1) {
      for (int m = 0; m < kM; ++m) {
        const float* at = x + m * x_stride + column;
        sum[m][0] = madd(v0, load(at), sum[m][0]);
        sum[m][1] = madd(v1, load(at + 8), sum[m][1]);
      }
    });
    for (int m = 0; m < kM; ++m) {
      const Vec v = _mm256_add_ps(sum[m][0], sum[m][1]);
      __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
      half = _mm_add_ps(half, _mm_movehl_ps(half, half));
      out[m] += _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
  }
};

}  // namespace

const GemmConfig kGemmAvx2 = {"avx2", has_avx2, FloatGemm<Avx2>::plan, FloatGemm<Avx2>::prepare,
                              FloatGemm<Avx2>::run};

}  // namespace spense::cpu
