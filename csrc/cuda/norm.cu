// SPDX-License-Identifier: Apache-2.0
// rms_norm_quantize and add_rms_norm_quantize.
#include "cuda/launch_rows.cuh"

namespace spense::cuda {
namespace {

template <typename T, typename W, bool kAdd>
struct NormSource {
  const T *x, *residual;
  T* sum;
  const W* weight;
  int64_t x_stride, residual_stride, k;
  float eps, offset, count;  // offset: of the weight; count: k
  bool aligned;

  using Element = T;
  using Kept = Eight<float>;  // x * w
  using Held = Eight<float>;
  static constexpr int kInputs = kAdd ? 2 : 1;
  static constexpr bool kSums = true;
  static constexpr int kMaxRows = sizeof(T) == 2 ? 4 : 2;
  static constexpr int kMaxVectors = 2;
  static constexpr int kManyVectors = 1;
  struct Few {
    static constexpr int kOne = 0, kTwo = 512, kFour = 0;
  };

  __device__ const T* input(int i, int64_t m) const {
    return i == 0 ? x + m * x_stride : residual + m * residual_stride;
  }
  __device__ int64_t stride(int i) const { return i == 0 ? x_stride : residual_stride; }
  template <bool kRegular>
  __device__ Held hold(int c, int left) const {
    const auto narrow = load_columns<Reuse::kOthers, kRegular>(weight + c, left);
    Held wide;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      wide.set_pair(i, __fadd_rn(offset, narrow.get(i)), __fadd_rn(offset, narrow.get(i + 1)));
    }
    return wide;
  }

  template <bool kRegular>
  __device__ Kept take(const Eight<T> (&in)[kInputs], int64_t m, int c, int left, const Held& held,
                       double& sum_of_squares) const {
    Eight<T> s = in[0];
    if constexpr (kAdd) {
      const Eight<T>& other = in[1];
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        s.set_pair(i, __fadd_rn(s.get(i), other.get(i)), __fadd_rn(s.get(i + 1), other.get(i + 1)));
      }
      store_columns<kRegular>(sum + m * k + c, s, left);
    }
    Kept weighted;
    float squares[4];  // of pairs
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float v[2] = {s.get(i), s.get(i + 1)};
      weighted.set_pair(i, __fmul_rn(v[0], held.get(i)), __fmul_rn(v[1], held.get(i + 1)));
      squares[i / 2] = __fadd_rn(__fmul_rn(v[0], v[0]), __fmul_rn(v[1], v[1]));
    }
    sum_of_squares +=
        __fadd_rn(__fadd_rn(squares[0], squares[1]), __fadd_rn(squares[2], squares[3]));
    return weighted;
  }
  __device__ void raise(uint32_t& peak, const Kept& kept) const { raise_floats(peak, kept); }
  __device__ float factor(double squares) const {
    const float mean = __fdiv_rn(static_cast<float>(squares), count);
    return __frcp_rn(__fsqrt_rn(__fadd_rn(mean, eps)));
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
  source.count = static_cast<float>(source.k);
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
