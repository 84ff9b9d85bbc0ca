// SPDX-License-Identifier: Apache-2.0
// The rows of neighbours.h, as straight loops that compilers vectorise. No step depends on the
// instruction set, so all configurations give the same bits; sums go over 16 lanes everywhere.
// Everything has internal linkage, because it is compiled once for each instruction set.
#pragma once

#ifdef __AVX__
#include <immintrin.h>
#endif

#include <algorithm>

#include "cpu/neighbours.h"
#include "cpu/quantize_common.h"

namespace spense::cpu {
namespace {

// With masks: compilers do not take float arithmetic out of a conditional.
inline float choose(bool condition, float yes, float no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return std::bit_cast<float>((std::bit_cast<uint32_t>(yes) & mask) |
                              (std::bit_cast<uint32_t>(no) & ~mask));
}

inline float min_of(float a, float b) { return choose(a < b, a, b); }
inline float max_of(float a, float b) { return choose(a > b, a, b); }

// 2^t for t in [-126, 127], clamped to that; a NaN becomes a bound.
inline float exp2_clamped(float t) {
  constexpr float kRound = 0x1.8p23f;  // added and taken away, it leaves the nearest integer
  t = max_of(min_of(t, 127.0f), -126.0f);
  const float shifted = t + kRound;
  const float f = t - (shifted - kRound);
  float p = activation::kExp2[activation::kExp2Degree];
  for (int i = activation::kExp2Degree - 1; i >= 0; --i) p = p * f + activation::kExp2[i];
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) +
                              (std::bit_cast<uint32_t>(shifted) << 23));
}

template <Activation kActivation>
float activate(float g) {
  using namespace activation;
  if constexpr (kActivation == Activation::kSilu) {
    return g / (1.0f + exp2_clamped(g * -kLog2E));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return g / (1.0f + exp2_clamped(g * (kGeluLinear + kGeluCubic * (g * g))));
  } else {
    const float magnitude = std::bit_cast<float>(std::bit_cast<uint32_t>(g) & 0x7FFFFFFFu);
    const float r = 1.0f / (magnitude + kTailShift);
    float q = activation::tail(kTailDegree);
    for (int i = kTailDegree - 1; i >= 0; --i) q = q * r + activation::tail(i);
    return max_of(g, 0.0f) - (q * r * magnitude) * exp2_clamped(kGeluSquare * (g * g));
  }
}

template <int kType>
void to_floats(const void* row, int64_t k, float* out) {
  for (int64_t i = 0; i < k; ++i) out[i] = load_float(row, i, static_cast<FloatType>(kType));
}

// v += residual, rounded to the type and stored to sum.
template <int kType>
void add_rounded(const void* residual, int64_t k, float* v, void* sum) {
  constexpr auto type = static_cast<FloatType>(kType);
  for (int64_t i = 0; i < k; ++i) {
    store_float(sum, i, type, v[i] + load_float(residual, i, type));
    v[i] = load_float(sum, i, type);
  }
}

constexpr int kSumLanes = 16, kSumStep = 8 * kSumLanes;

#ifdef __AVX__
// Squares of 16 columns, added in pairs: of 0 to 3 and 8 to 11, then of the others.
inline __m256 paired_squares(const float* v) {
  const __m256 a = _mm256_loadu_ps(v), b = _mm256_loadu_ps(v + 8);
  return _mm256_hadd_ps(_mm256_mul_ps(a, a), _mm256_mul_ps(b, b));
}
#endif

// lane[j] += squares of v[8 j] to v[8 j + 7], added in float32.
inline void add_squares(const float* v, double* lane) {
#ifdef __AVX__  // which compilers do not come to from the loops below
  for (int j = 0; j < kSumLanes; j += 4, v += 32) {
    const __m256 fours = _mm256_hadd_ps(paired_squares(v), paired_squares(v + 16));
    const __m128 runs = _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1));
    _mm256_storeu_pd(lane + j, _mm256_add_pd(_mm256_loadu_pd(lane + j), _mm256_cvtps_pd(runs)));
  }
#else
  float pairs[4 * kSumLanes], fours[2 * kSumLanes];
  for (int j = 0; j < 4 * kSumLanes; ++j) {
    pairs[j] = v[2 * j] * v[2 * j] + v[2 * j + 1] * v[2 * j + 1];
  }
  for (int j = 0; j < 2 * kSumLanes; ++j) fours[j] = pairs[2 * j] + pairs[2 * j + 1];
  for (int j = 0; j < kSumLanes; ++j) lane[j] += fours[2 * j] + fours[2 * j + 1];
#endif
}

inline double sum_of_squares(const float* v, int64_t k) {
  double lane[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumStep <= k; i += kSumStep) add_squares(v + i, lane);
  float last[kSumStep] = {};
  std::copy(v + i, v + k, last);
  add_squares(last, lane);
  double sum = 0.0;
  for (const double part : lane) sum += part;
  return sum;
}

inline const void* row_of(const void* base, int64_t m, int64_t stride, FloatType type) {
  return static_cast<const char*>(base) + m * stride * bytes_of(type);
}

template <typename Row, int kType>
void norm_rows_of(const NormArgs& args, int64_t row_begin, int64_t row_end) {
  constexpr auto type = static_cast<FloatType>(kType);
  const QuantizeArgs& rows = args.rows;
  const int64_t k = rows.k;
  const Buffer<float> v(k);
  const Bytes bytes(rows.gather ? k : 0);
  for (int64_t m = row_begin; m < row_end; ++m) {
    to_floats<kType>(row_of(rows.x, m, rows.x_stride, type), k, v.data);
    if (args.residual) {
      add_rounded<kType>(row_of(args.residual, m, args.residual_stride, type), k, v.data,
                         static_cast<char*>(args.sum) + m * k * bytes_of(type));
    }
    const float mean = static_cast<float>(sum_of_squares(v.data, k)) / static_cast<float>(k);
    const float r = 1.0f / __builtin_sqrtf(mean + args.eps);
    for (int64_t i = 0; i < k; ++i) v.data[i] = (v.data[i] * args.weight[i]) * r;
    quantize_row<Row>(v.data, FloatType::kFloat32, rows, m, bytes.data);
  }
}

template <typename Row>
void norm_rows(const NormArgs& args, int64_t row_begin, int64_t row_end) {
  switch (args.rows.in) {
    case FloatType::kBFloat16:
      return norm_rows_of<Row, 0>(args, row_begin, row_end);
    case FloatType::kFloat16:
      return norm_rows_of<Row, 1>(args, row_begin, row_end);
    default:
      return norm_rows_of<Row, 2>(args, row_begin, row_end);
  }
}

template <Activation kActivation>
void multiply_activated(const float* gate, const float* up, int64_t k, float* v) {
  for (int64_t i = 0; i < k; ++i) v[i] = activate<kActivation>(gate[i]) * up[i];
}

template <typename Row, int kType>
void gated_rows_of(const GatedArgs& args, int64_t row_begin, int64_t row_end) {
  constexpr auto type = static_cast<FloatType>(kType);
  const QuantizeArgs& rows = args.rows;
  const int64_t k = rows.k;
  const Buffer<float> memory(3 * k);
  float *gate = memory.data, *up = gate + k, *v = up + k;
  const Bytes bytes(rows.gather ? k : 0);
  for (int64_t m = row_begin; m < row_end; ++m) {
    to_floats<kType>(row_of(rows.x, m, rows.x_stride, type), k, gate);
    to_floats<kType>(row_of(args.up, m, args.up_stride, type), k, up);
    switch (args.activation) {
      case Activation::kSilu:
        multiply_activated<Activation::kSilu>(gate, up, k, v);
        break;
      case Activation::kGeluTanh:
        multiply_activated<Activation::kGeluTanh>(gate, up, k, v);
        break;
      case Activation::kGeluErf:
        multiply_activated<Activation::kGeluErf>(gate, up, k, v);
        break;
    }
    quantize_row<Row>(v, FloatType::kFloat32, rows, m, bytes.data);
  }
}

template <typename Row>
void gated_rows(const GatedArgs& args, int64_t row_begin, int64_t row_end) {
  switch (args.rows.in) {
    case FloatType::kBFloat16:
      return gated_rows_of<Row, 0>(args, row_begin, row_end);
    case FloatType::kFloat16:
      return gated_rows_of<Row, 1>(args, row_begin, row_end);
    default:
      return gated_rows_of<Row, 2>(args, row_begin, row_end);
  }
}

}  // namespace
}  // namespace spense::cpu
