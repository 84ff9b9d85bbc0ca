// SPDX-License-Identifier: Apache-2.0
// rms_norm_quantize and add_rms_norm_quantize.
#include "cuda/held_rows.cuh"

namespace spense::cuda {
namespace {

// |v| as float64, by integer steps: the conversion runs at an eighth of their rate. Zero and
// subnormals become 2^-127 or more, whose square no float32 shows, infinity and NaN 2^128 or more,
// whose square is infinity in float32.
__device__ inline double magnitude(float v) {
  constexpr uint32_t kBias = (1023 - 127) << 20;
  const uint32_t bits = __float_as_uint(v) & 0x7FFFFFFFu;
  return __hiloint2double(static_cast<int>((bits >> 3) + kBias), static_cast<int>(bits << 29));
}

template <typename T, typename W, bool kAdd>
struct NormSource {
  const T *x, *residual;
  T* sum;
  const W* weight;
  int64_t x_stride, residual_stride, k;
  float eps, offset;  // offset: of the weight
  bool aligned;

  using Element = T;
  using Kept = Eight<T>;
  using Held = Eight<W>;
  static constexpr int kInputs = kAdd ? 2 : 1;
  static constexpr bool kSums = true;
  static constexpr int kMaxRows = sizeof(T) == 2 ? 4 : 2;
  static constexpr int kMaxVectors = 2;

  __device__ const T* input(int i, int64_t m) const {
    return i == 0 ? x + m * x_stride : residual + m * residual_stride;
  }
  __device__ int64_t stride(int i) const { return i == 0 ? x_stride : residual_stride; }
  template <bool kRegular>
  __device__ Held hold(int c, int left) const {
    return load_columns<Reuse::kOthers, kRegular>(weight + c, left);
  }

  template <bool kRegular>
  __device__ Kept take(const Eight<T> (&in)[kInputs], int64_t m, int c, int left,
                       double& squares) const {
    Kept s = in[0];
    if constexpr (kAdd) {
      const Eight<T>& other = in[1];
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        s.set_pair(i, __fadd_rn(s.get(i), other.get(i)), __fadd_rn(s.get(i + 1), other.get(i + 1)));
      }
      store_columns<kRegular>(sum + m * k + c, s, left);
    }
    double both[2] = {squares, 0.0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const double v = magnitude(s.get(i));
      both[i % 2] = fma(v, v, both[i % 2]);
    }
    squares = both[0] + both[1];
    return s;
  }
  __device__ float factor(double total) const {
    const float mean = __fdiv_rn(static_cast<float>(total), static_cast<float>(k));
    return __frcp_rn(__fsqrt_rn(__fadd_rn(mean, eps)));
  }
  __device__ float value(const Kept& s, int i, float r, const Held& held) const {
    return __fmul_rn(__fmul_rn(s.get(i), r), __fadd_rn(offset, held.get(i)));
  }
  __device__ uint32_t raise(uint32_t peak, const Kept& s, float r, const Held& held) const {
    float largest = __uint_as_float(peak);
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = ptx::larger_magnitude(largest, value(s, i, r, held));
    return __float_as_uint(largest);
  }
};

template <typename T, typename W, bool kAdd>
void run(const NormArgs& args, Stream stream) {
  constexpr int64_t kLeastColumns = 8192;
  NormSource<T, W, kAdd> source;
  source.x = static_cast<const T*>(args.rows.x);
  source.residual = static_cast<const T*>(args.residual);
  source.sum = static_cast<T*>(args.sum);
  source.weight = static_cast<const W*>(args.weight);
  source.x_stride = args.rows.x_stride;
  source.residual_stride = args.residual_stride;
  source.k = args.rows.k;
  source.eps = args.eps;
  source.offset = args.unit_offset ? 1.0f : -0.0f;  // -0 + w is w, sign of zero and all
  source.aligned =
      aligned_rows<T>(args.rows.x, args.rows.x_stride) && aligned_rows<W>(args.weight, 0) &&
      aligned_rows<T>(args.residual, args.residual_stride) && aligned_rows<T>(args.sum, 0);
  launch_rows(source, args.rows, kLeastColumns, stream);
}

template <typename T, typename W>
void run(const NormArgs& args, Stream stream) {
  args.residual ? run<T, W, true>(args, stream) : run<T, W, false>(args, stream);
}

}  // namespace

void norm_quantize(const NormArgs& args, Stream stream) {
  with_type(args.rows.in, [&]<typename T>() {
    args.float_weight ? run<T, float>(args, stream) : run<T, T>(args, stream);
  });
}

}  // namespace spense::cuda
