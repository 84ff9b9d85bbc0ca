// SPDX-License-Identifier: Apache-2.0
// silu_mul_quantize and gelu_mul_quantize. Powers of two and quotients are the hardware's
// approximations: relative error of v below 2^-15, mostly from the rounding of the exponent.
#include "cuda/launch_rows.cuh"

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
    const float r = __fdividef(1.0f, fabsf(g) + kTailShift);
    float q = activation::tail(kTailDegree);
#pragma unroll
    for (int i = kTailDegree - 1; i >= 0; --i) q = fmaf(q, r, activation::tail(i));
    const float power = ptx::exp2_fast(kGeluSquare * (g * g));
    return fmaf(q * r * -fabsf(g), power, fmaxf(g, 0.0f));
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

  __device__ const T* input(int i, int64_t m) const {
    return i == 0 ? gate + m * gate_stride : up + m * up_stride;
  }
  __device__ int64_t stride(int i) const { return i == 0 ? gate_stride : up_stride; }
  template <bool>
  __device__ Kept take(const Eight<T> (&in)[2], int64_t, int, int, Held, double&) const {
    Kept product;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      product.set_pair(i, activate<kActivation>(in[0].get(i)) * in[1].get(i),
                       activate<kActivation>(in[0].get(i + 1)) * in[1].get(i + 1));
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
