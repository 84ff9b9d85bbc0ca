// SPDX-License-Identifier: Apache-2.0
// rms_norm_quantize and add_rms_norm_quantize.
#include "cuda/row_slices.cuh"

namespace spense::cuda {
namespace {

template <typename T, typename W>
struct NormSource {
  const T *x, *residual;
  T* sum;
  const W* weight;
  int64_t x_stride, residual_stride, k;
  float eps;
  bool unit_offset, aligned;

  static constexpr bool kRecomputes = false;

  __device__ void prefetch(const Slice& slice) const {
    constexpr int kLine = 128 / sizeof(W);
    for (int c = slice.begin + static_cast<int>(threadIdx.x) * kLine; c < slice.end;
         c += blockDim.x * kLine) {
      ptx::prefetch_l2(weight + c);
    }
  }

  template <typename TeamType>
  __device__ uint32_t compute(float* v, int64_t row, const Slice& slice,
                              const TeamType& team) const {
    const T* x_row = x + row * x_stride;
    const T* residual_row = residual + row * residual_stride;
    T* sum_row = sum + row * k;
    double squares[2] = {};
    for_columns<T>(slice, aligned, [&](int c, auto count) {
      constexpr int n = decltype(count)::value;
      auto s = load_once<n>(x_row + c);
      if (residual) {
        const auto r = load_once<n>(residual_row + c);
#pragma unroll
        for (int i = 0; i < n; ++i) {
          from_float(__fadd_rn(to_float(s.at[i]), to_float(r.at[i])), s.at[i]);
        }
        *reinterpret_cast<Vec<T, n>*>(sum_row + c) = s;
      }
      Vec<float, n> wide;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        wide.at[i] = to_float(s.at[i]);
        squares[i % 2] =
            fma(static_cast<double>(wide.at[i]), static_cast<double>(wide.at[i]), squares[i % 2]);
      }
      *reinterpret_cast<Vec<float, n>*>(v + (c - slice.begin)) = wide;
    });
    const double total = team.template reduce<0>(squares[0] + squares[1]);
    const float mean = __fdiv_rn(static_cast<float>(total), static_cast<float>(k));
    const float r = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
    uint32_t peak = 0;
    for_columns<T>(slice, aligned, [&](int c, auto count) {
      constexpr int n = decltype(count)::value;
      float* at = v + (c - slice.begin);
      auto s = load<n>(at);
      const auto w = load<n>(weight + c);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        float factor = to_float(w.at[i]);
        if (unit_offset) factor = __fadd_rn(1.0f, factor);
        s.at[i] = __fmul_rn(__fmul_rn(s.at[i], r), factor);
        peak = max(peak, magnitude_bits(s.at[i]));
      }
      *reinterpret_cast<Vec<float, n>*>(at) = s;
    });
    return peak;
  }
};

template <typename T, typename W>
void run(const NormArgs& args, Stream stream) {
  constexpr int64_t kLeastColumns = 4096;
  NormSource<T, W> source;
  source.weight = static_cast<const W*>(args.weight);
  source.x_stride = args.rows.x_stride;
  source.residual_stride = args.residual_stride;
  source.k = args.rows.k;
  source.eps = args.eps;
  source.unit_offset = args.unit_offset;
  source.aligned = aligned_rows<T>(args.rows.x, args.rows.x_stride) &&
                   aligned_rows<T>(args.residual, args.residual_stride) &&
                   aligned_rows<W>(args.weight, 0) &&
                   (!args.residual || aligned_rows<T>(args.sum, args.rows.k));
  for_parts(args.rows, [&](const QuantizeArgs& part, int64_t row) {
    source.x = static_cast<const T*>(part.x);
    source.residual =
        args.residual ? static_cast<const T*>(args.residual) + row * args.residual_stride : nullptr;
    source.sum = static_cast<T*>(args.sum) + row * args.rows.k;
    launch_rows(source, part, kLeastColumns, stream);
  });
}

}  // namespace

void norm_quantize(const NormArgs& args, Stream stream) {
  with_type(args.rows.in, [&]<typename T>() {
    args.float_weight ? run<T, float>(args, stream) : run<T, T>(args, stream);
  });
}

}  // namespace spense::cuda
