// SPDX-License-Identifier: Apache-2.0
// quantize_fp8: a CTA holds kRows whole rows of x in shared memory, column by column with the rows
// of a column beside each other, so that one random access by the gather serves them all.
//
//   few rows:  grid (slices of the columns, rows), one row a CTA; every slice reads the whole row
//              for its maximum, which costs L2 reads and saves a second pass
//   many rows: 8 bytes a column (4 rows of 16 bits, 2 of 32), one slice
//   rows too long for shared memory: one row a CTA, the second read comes from L2
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>

#include "cuda/quantize.h"
#include "device/launch.h"
#include "device/ptx.cuh"

namespace spense::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSmem = 220 * 1024;
constexpr int kRowPad = 128;  // rows of y are this multiple long
constexpr uint32_t kInfinityBits = 0x7F800000u;
constexpr uint32_t kNanByte = 0x7F;

__device__ float to_float(float v) { return v; }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ uint32_t magnitude_bits(float v) { return __float_as_uint(v) & 0x7FFFFFFFu; }

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

// Maximum over the CTA for each row; every thread gets all of them.
template <int kRows>
__device__ void reduce_max(uint32_t (&bits)[kRows]) {
  __shared__ uint32_t of_warp[kRows][kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const uint32_t v = __reduce_max_sync(~0u, bits[r]);
    if (lane == 0) of_warp[r][warp] = v;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    bits[r] = __reduce_max_sync(~0u, lane < kWarps ? of_warp[r][lane] : 0u);
  }
}

// kVector: columns that one thread writes at once. kStaged: rows go through shared memory.
template <typename T, int kRows, int kVector, bool kStaged>
__global__ void __launch_bounds__(kThreads) quantize_rows(const QuantizeArgs p) {
  static_assert(kStaged || kRows == 1);
  static_assert(kRowPad % kVector == 0);
  extern __shared__ __align__(16) unsigned char smem[];
  using Column = Pack<T, kRows>;
  constexpr int kLoad = 16 / sizeof(T);
  Column* columns = reinterpret_cast<Column*>(smem);

  ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();

  const int k = static_cast<int>(p.k);
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kRows;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRows), p.m - row0));
  const T* x = static_cast<const T*>(p.x) + row0 * p.x_stride;

  uint32_t peak[kRows] = {};
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_stride % kLoad == 0;
  const int vector_end = aligned ? k / kLoad * kLoad : 0;
#pragma unroll 2
  for (int c = threadIdx.x * kLoad; c < vector_end; c += kThreads * kLoad) {
    Pack<T, kLoad> row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int source = r < rows ? r : 0;
      row[r] = *reinterpret_cast<const Pack<T, kLoad>*>(x + source * p.x_stride + c);
    }
#pragma unroll
    for (int i = 0; i < kLoad; ++i) {
      Column column;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        column.at[r] = row[r].at[i];
        peak[r] = max(peak[r], magnitude_bits(to_float(column.at[r])));
      }
      if constexpr (kStaged) columns[c + i] = column;
    }
  }
  for (int c = vector_end + threadIdx.x; c < k; c += kThreads) {
    Column column;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      column.at[r] = x[(r < rows ? r : 0) * p.x_stride + c];
      peak[r] = max(peak[r], magnitude_bits(to_float(column.at[r])));
    }
    if constexpr (kStaged) columns[c] = column;
  }
  reduce_max(peak);  // also the barrier between filling the columns and reading them

  float inverse[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float scale = fmaxf(__uint_as_float(peak[r]), 1e-12f) * (1.0f / 448.0f);
    inverse[r] = __fdiv_rn(1.0f, scale);
    if (threadIdx.x == 0 && blockIdx.x == 0 && r < rows) {
      p.scale[row0 + r] = peak[r] >= kInfinityBits ? __uint_as_float(0x7FC00000u) : scale;
    }
  }

  const int width = static_cast<int>(p.y_stride) / static_cast<int>(gridDim.x) / kRowPad * kRowPad;
  const int begin = blockIdx.x * width;
  const int end = blockIdx.x + 1 == gridDim.x ? static_cast<int>(p.y_stride) : begin + width;
  for (int c = begin + threadIdx.x * kVector; c < end; c += kThreads * kVector) {
    int from[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) from[i] = c + i;
    if (p.gather) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) from[i] = c + i < k ? __ldg(p.gather + c + i) : 0;
    }
    alignas(16) uint8_t out[kRows][kVector];
#pragma unroll
    for (int i = 0; i < kVector; i += 2) {
      float v[2][kRows];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column =
            static_cast<uint32_t>(from[i + j]) < static_cast<uint32_t>(k) ? from[i + j] : 0;
        if constexpr (kStaged) {
          const Column got = columns[column];
#pragma unroll
          for (int r = 0; r < kRows; ++r) v[j][r] = to_float(got.at[r]);
        } else {
          v[j][0] = to_float(x[column]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        uint32_t pair = __nv_cvt_float2_to_fp8x2(
            make_float2(v[0][r] * inverse[r], v[1][r] * inverse[r]), __NV_SATFINITE, __NV_E4M3);
        if (peak[r] >= kInfinityBits) pair = kNanByte | kNanByte << 8;
        out[r][i] = c + i < k ? static_cast<uint8_t>(pair) : 0;
        out[r][i + 1] = c + i + 1 < k ? static_cast<uint8_t>(pair >> 8) : 0;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      *reinterpret_cast<Pack<uint8_t, kVector>*>(p.y + (row0 + r) * p.y_stride + c) =
          *reinterpret_cast<const Pack<uint8_t, kVector>*>(out[r]);
    }
  }
}

template <typename T>
void run(const QuantizeArgs& args, Stream stream) {
  constexpr int kManyRows = 8 / sizeof(T);
  const int64_t multiprocessors = device_info().multiprocessors;
  const int64_t row_bytes = args.k * static_cast<int64_t>(sizeof(T));
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.dependent = true;
  const auto go = [&](auto* kernel, int64_t rows, int64_t slices, int64_t bytes) {
    shape.grid =
        dim3(static_cast<unsigned>(slices), static_cast<unsigned>((args.m + rows - 1) / rows));
    shape.smem_bytes = static_cast<int>(bytes);
    if (bytes > 48 * 1024) allow_smem(kernel, kMaxSmem);
    launch(kernel, shape, stream, args);
  };
  if (args.m >= 2 * kManyRows * multiprocessors && kManyRows * row_bytes <= kMaxSmem) {
    go(&quantize_rows<T, kManyRows, 8, true>, kManyRows, 1, kManyRows * row_bytes);
    return;
  }
  const int64_t slices = std::clamp<int64_t>(2 * multiprocessors / args.m, 1,
                                             std::min<int64_t>(16, args.y_stride / 512 + 1));
  if (row_bytes <= kMaxSmem) {
    go(&quantize_rows<T, 1, 4, true>, 1, slices, row_bytes);
  } else {
    go(&quantize_rows<T, 1, 4, false>, 1, slices, 0);
  }
}

}  // namespace

void quantize_fp8(const QuantizeArgs& args, Stream stream) {
  constexpr int64_t kMaxGridRows = 65535;  // of grid.y
  for (int64_t row = 0; row < args.m; row += kMaxGridRows) {
    QuantizeArgs part = args;
    part.m = std::min(kMaxGridRows, args.m - row);
    part.x = static_cast<const char*>(args.x) + row * args.x_stride * bytes_of(args.in);
    part.y = args.y + row * args.y_stride;
    part.scale = args.scale + row;
    switch (args.in) {
      case InType::kBFloat16:
        run<__nv_bfloat16>(part, stream);
        break;
      case InType::kFloat16:
        run<__half>(part, stream);
        break;
      case InType::kFloat32:
        run<float>(part, stream);
        break;
    }
  }
}

}  // namespace spense::cuda
