// SPDX-License-Identifier: Apache-2.0
// silu_mul_quantize and gelu_mul_quantize. Powers of two and quotients are the hardware's
// approximations: relative error of v below 2^-15, mostly from the rounding of the exponent.
#include "cuda/launch_rows.cuh"

namespace spense::cuda {
namespace {

// Two quotients by one of the hardware's reciprocals, which take longer than products. The product
// of the divisors must be finite.
__device__ inline void invert(float (&v)[2]) {
  const float both = __fdividef(1.0f, v[0] * v[1]);
  const float first = both * v[1];
  v[1] = both * v[0], v[0] = first;
}

// Of two gates. Those so far below zero that a divisor would exceed 2^63 count as zero.
template <Activation kActivation>
__device__ void activate(const float (&gates)[2], float (&v)[2]) {
  using namespace activation;
  if constexpr (kActivation != Activation::kGeluErf) {
    constexpr float kLeast = kActivation == Activation::kSilu ? -43.5f : -7.6f;
    float g[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      g[i] = gates[i] < kLeast ? 0.0f : gates[i];
      const float slope =
          kActivation == Activation::kSilu ? -kLog2E : kGeluLinear + kGeluCubic * (g[i] * g[i]);
      v[i] = 1.0f + ptx::exp2_fast(g[i] * slope);
    }
    invert(v);
#pragma unroll
    for (int i = 0; i < 2; ++i) v[i] *= g[i];
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float g = gates[i], r = __fdividef(1.0f, fabsf(g) + kTailShift);
      float q = activation::tail(kTailDegree);
#pragma unroll
      for (int j = kTailDegree - 1; j >= 0; --j) q = fmaf(q, r, activation::tail(j));
      const float power = ptx::exp2_fast(kGeluSquare * (g * g));
      v[i] = fmaf(q * r * -fabsf(g), power, fmaxf(g, 0.0f));
    }
  }
}

template <typename T, Activation kActivation>
struct GatedSource : Weightless {
  const T *gate, *up;
  int64_t gate_stride, up_stride;
  bool aligned;

  using Element = T;
  using Kept = Eight<float>;
  static constexpr int kInputs = 2;
  static constexpr int kMaxRows = 2;
  static constexpr int kMaxVectors = sizeof(T) == 2 ? 4 : 2;
  static constexpr int kManyVectors = 1;
  struct Few {
    static constexpr int kOne = 0, kTwo = 512, kFour = sizeof(T) == 2 ? 512 : 0;
  };

  __device__ const T* input(int i, int64_t m) const {
    return i == 0 ? gate + m * gate_stride : up + m * up_stride;
  }
  __device__ int64_t stride(int i) const { return i == 0 ? gate_stride : up_stride; }
  template <bool>
  __device__ Kept take(const Eight<T> (&in)[2], int64_t, int, int, Held, double&) const {
    Kept product;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float gates[2] = {in[0].get(i), in[0].get(i + 1)};
      float v[2];
      activate<kActivation>(gates, v);
      product.set_pair(i, v[0] * in[1].get(i), v[1] * in[1].get(i + 1));
    }
    return product;
  }
  __device__ void raise(uint32_t& peak, const Kept& kept) const { raise_floats(peak, kept); }
};

template <typename T, Activation kActivation>
void run(const GatedArgs& args, Stream stream) {
  constexpr int64_t kLeastColumns = 4096;
  GatedSource<T, kActivation> source;
  source.gate_stride = args.rows.x_stride;
  source.up_stride = args.up_stride;
  source.aligned =
      aligned_rows<T>(args.rows.x, args.rows.x_stride) && aligned_rows<T>(args.up, args.up_stride);
  source.gate = static_cast<const T*>(args.rows.x);
  source.up = static_cast<const T*>(args.up);
  launch_rows(source, args.rows, kLeastColumns, stream);
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
