// SPDX-License-Identifier: Apache-2.0
// silu_mul_quantize and gelu_mul_quantize. Powers of two and quotients are the hardware's
// approximations: relative error of v below 2^-15, mostly from the rounding of the exponent.
#include "cuda/row_slices.cuh"

namespace spense::cuda {
namespace {

template <Activation kActivation>
__device__ float activate(float g) {
  using namespace activation;
  if constexpr (kActivation == Activation::kSilu) {
    return __fdividef(g, 1.0f + ptx::exp2_fast(g * -kLog2E));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return __fdividef(g, 1.0f + ptx::exp2_fast(g * (kGeluLinear + kGeluCubic * (g * g))));
  } else {
    const float r = __fdividef(1.0f, 1.0f + 0.5f * fminf(fabsf(g) * kInverseSqrt2, kLargestH));
    float q = activation::tail(kTailDegree);
#pragma unroll
    for (int i = kTailDegree - 1; i >= 0; --i) q = fmaf(q, r, activation::tail(i));
    const float tail = ptx::exp2_fast(kGeluSquare * (g * g)) * (q * r);
    return g * (g < 0.0f ? tail : 1.0f - tail);
  }
}

template <typename T, Activation kActivation>
struct GatedSource {
  const T *gate, *up;
  int64_t gate_stride, up_stride;
  bool aligned;

  static constexpr bool kRecomputes = true;

  __device__ void prefetch(const Slice&) const {}

  __device__ float value(int64_t row, int column) const {
    return activate<kActivation>(to_float(gate[row * gate_stride + column])) *
           to_float(up[row * up_stride + column]);
  }

  template <typename TeamType>
  __device__ uint32_t compute(float* v, int64_t row, const Slice& slice, const TeamType&) const {
    const T* gate_row = gate + row * gate_stride;
    const T* up_row = up + row * up_stride;
    uint32_t peak = 0;
    for_columns<T>(slice, aligned, [&](int c, auto count) {
      constexpr int n = decltype(count)::value;
      const auto g = load_once<n>(gate_row + c), u = load_once<n>(up_row + c);
      Vec<float, n> product;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        product.at[i] = activate<kActivation>(to_float(g.at[i])) * to_float(u.at[i]);
        peak = max(peak, magnitude_bits(product.at[i]));
      }
      *reinterpret_cast<Vec<float, n>*>(v + (c - slice.begin)) = product;
    });
    return peak;
  }
};

template <typename T, Activation kActivation>
void run(const GatedArgs& args, Stream stream) {
  constexpr int64_t kLeastColumns = 2048;
  GatedSource<T, kActivation> source;
  source.gate_stride = args.rows.x_stride;
  source.up_stride = args.up_stride;
  source.aligned =
      aligned_rows<T>(args.rows.x, args.rows.x_stride) && aligned_rows<T>(args.up, args.up_stride);
  for_parts(args.rows, [&](const QuantizeArgs& part, int64_t row) {
    source.gate = static_cast<const T*>(part.x);
    source.up = static_cast<const T*>(args.up) + row * args.up_stride;
    launch_rows(source, part, kLeastColumns, stream);
  });
}

template <typename T>
void run(const GatedArgs& args, Stream stream) {
  switch (args.activation) {
    case Activation::kSilu:
      return run<T, Activation::kSilu>(args, stream);
    case Activation::kGeluTanh:
      return run<T, Activation::kGeluTanh>(args, stream);
    case Activation::kGeluErf:
      return run<T, Activation::kGeluErf>(args, stream);
  }
}

}  // namespace

void gated_quantize(const GatedArgs& args, Stream stream) {
  with_type(args.rows.in, [&]<typename T>() { run<T>(args, stream); });
}

}  // namespace spense::cuda
