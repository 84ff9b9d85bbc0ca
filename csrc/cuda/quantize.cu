// SPDX-License-Identifier: Apache-2.0
// quantize_fp8: rows as they are, held in registers; rows too long for that are read twice.
#include "cuda/launch_rows.cuh"

namespace spense::cuda {
namespace {

// Magnitudes are compared as integers: the bits of |x| order as the numbers do, NaN above all.
// Elements of 16 bits come two a word.
template <typename T>
__device__ uint32_t larger(uint32_t peak, uint32_t word) {
  if constexpr (sizeof(T) == 2) return __vmaxu2(peak, word & 0x7FFF7FFFu);
  return max(peak, word & 0x7FFFFFFFu);
}
// float32 bits of the magnitude that `larger` found.
template <typename T>
__device__ uint32_t float_bits(uint32_t peak) {
  if constexpr (sizeof(T) == 4) return peak;
  const auto half = static_cast<uint16_t>(max(peak & 0xFFFF, peak >> 16));
  return __float_as_uint(to_float(*reinterpret_cast<const T*>(&half)));
}

template <typename T>
struct PlainSource : Weightless {
  const T* x;
  int64_t x_stride;
  bool aligned;

  using Element = T;
  using Kept = Eight<T>;
  static constexpr int kInputs = 1;
  static constexpr int kMaxRows = sizeof(T) == 2 ? 4 : 2;
  static constexpr int kMaxVectors = 4;
  static constexpr int kManyVectors = 2;  // so that one CTA computes while another waits
  struct Few {
    static constexpr int kOne = 1024, kTwo = 0, kFour = 512;
  };

  __device__ const T* input(int, int64_t m) const { return x + m * x_stride; }
  __device__ int64_t stride(int) const { return x_stride; }
  template <bool>
  __device__ Kept take(const Eight<T> (&in)[1], int64_t, int, int, Held, double&) const {
    return in[0];
  }
  __device__ void raise(uint32_t& peak, const Kept& kept) const {
    uint32_t largest = 0;
#pragma unroll
    for (const uint32_t word : kept.words) largest = larger<T>(largest, word);
    peak = max(peak, float_bits<T>(largest));
  }
};

constexpr int kLongThreads = 512;

// A CTA a row.
template <typename T>
__global__ void __launch_bounds__(kLongThreads)
    quantize_long_rows(const PlainSource<T> source, const QuantizeArgs p) {
  __shared__ Parts<1, false> parts;
  ptx::grid_launch_dependents();
  parts.init();
  __syncthreads();
  ptx::grid_dependency_wait();
  const int64_t row = blockIdx.y;
  const T* x = source.input(0, row);
  const int k = static_cast<int>(p.k), stride = kLongThreads * kColumns;
  const int first = static_cast<int>(threadIdx.x) * kColumns;
  Found found[1] = {};
  for (int c = first; c < k; c += stride) {
    source.raise(found[0].peak, load_columns<Reuse::kOthers, false>(x + c, k - c));
  }
  const Found all = exchange(found, Team{0, 1}, parts, 0);
  const float scale = scale_of(__uint_as_float(all.peak)), inverse = __frcp_rn(scale);
  if (threadIdx.x == 0) p.scale[row] = scale;
  for (int c = first; c < static_cast<int>(p.y_stride); c += stride) {
    uint32_t pairs[kColumns / 2];
    for (int i = 0; i < kColumns; ++i) {
      int from = c + i;
      if (p.gather && from < k) from = p.gather[from];
      from = static_cast<uint32_t>(from) < static_cast<uint32_t>(k) ? from : 0;
      const float v = __fmul_rn(to_float(x[from]), inverse);
      pairs[i / 2] = i % 2 == 0 ? fp8_pair(v, 0.0f) : pairs[i / 2] | fp8_pair(v, 0.0f) << 8;
    }
    store_bytes<false>(p.y + row * p.y_stride + c, k - c,
                       {pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16});
  }
}

template <typename T>
void run(const QuantizeArgs& args, Stream stream) {
  constexpr int64_t kLeastColumns = 8192;
  const auto source_of = [](const QuantizeArgs& rows) {
    return PlainSource<T>{
        {}, static_cast<const T*>(rows.x), rows.x_stride, aligned_rows<T>(rows.x, rows.x_stride)};
  };
  if (args.k <= kMaxFusedColumns) return launch_rows(source_of(args), args, kLeastColumns, stream);
  for (int64_t row = 0; row < args.m; row += kMaxGridRows) {
    QuantizeArgs part = args;
    part.m = std::min(kMaxGridRows, args.m - row);
    part.x = static_cast<const T*>(args.x) + row * args.x_stride;
    part.y += row * args.y_stride;
    part.scale += row;
    LaunchShape shape;
    shape.grid = dim3(1, static_cast<unsigned>(part.m));
    shape.block = dim3(kLongThreads);
    shape.dependent = true;
    launch(&quantize_long_rows<T>, shape, stream, source_of(part), part);
  }
}

}  // namespace

void quantize_fp8(const QuantizeArgs& args, Stream stream) {
  with_type(args.in, [&]<typename T>() { run<T>(args, stream); });
}

}  // namespace spense::cuda
