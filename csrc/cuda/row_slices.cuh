// SPDX-License-Identifier: Apache-2.0
// Rows that are computed and then quantised: a CTA, or a cluster of CTAs that share the columns of
// the row among them, holds the row v as float32 in shared memory, so that the gather reads memory
// once it knows the maximum.
//
//   many rows: a CTA a row, several CTAs an SM overlap each other's loads, sums and stores
//   few rows:  up to 8 CTAs a row; the sum and the maximum go through the cluster, and so do those
//              reads of the gather that leave the slice, unless the Source can recompute a column
//              (kRecomputes), which costs less than 4-byte reads of another CTA's memory
//
// A Source holds the inputs and brings
//   prefetch(begin, end)              what it reads that no kernel before writes
//   compute(v, row, slice, team)      fills v[0, end - begin), returns the bits of the largest |v|
//   kRecomputes, value(row, column)   whether v[column] follows from that column alone, and how
// and every thread keeps the columns that for_columns gives it from one pass to the next.
#pragma once

#include <cuda_fp8.h>

#include "cuda/neighbours.h"
#include "cuda/rows.cuh"
#include "device/launch.h"
#include "device/ptx.cuh"
#include "device/ptx_rows.cuh"

namespace spense::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kMaxCluster = 8;
constexpr int kSliceStep = 128;  // slices are multiples of this many columns
constexpr int kOutputs = 8;      // bytes that one thread writes at once
constexpr uint32_t kNanBytes = 0x7F7F;
static_assert(kMaxFusedColumns <= kMaxCluster * (kMaxSmem / int{sizeof(float)}));

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vec {
  T at[kCount];
};
template <int kCount, typename T>
__device__ Vec<T, kCount> load(const T* from) {
  return *reinterpret_cast<const Vec<T, kCount>*>(from);
}

// For inputs that nobody reads again: they must not push the gather out of L1.
template <int kCount, typename T>
__device__ Vec<T, kCount> load_once(const T* from) {
  if constexpr (sizeof(T) * kCount == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
    return *reinterpret_cast<const Vec<T, kCount>*>(&bits);
  } else {
    return load<kCount>(from);
  }
}

__device__ inline void from_float(float v, float& to) { to = v; }
__device__ inline void from_float(float v, __half& to) { to = __float2half_rn(v); }
__device__ inline void from_float(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

__device__ inline uint32_t magnitude_bits(float v) { return __float_as_uint(v) & 0x7FFFFFFFu; }

struct Slice {
  int begin, end;  // columns of v that this CTA computes
};

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// body(column, Count<n>): n columns from there on, 16 bytes of T where `aligned`, else one.
template <typename T, typename Body>
__device__ void for_columns(const Slice& slice, bool aligned, const Body& body) {
  constexpr int kLoad = 16 / sizeof(T);
  const int threads = blockDim.x;
  const int vector_end =
      aligned ? slice.begin + max(slice.end - slice.begin, 0) / kLoad * kLoad : slice.begin;
#pragma unroll 2
  for (int c = slice.begin + threadIdx.x * kLoad; c < vector_end; c += threads * kLoad) {
    body(c, Count<kLoad>());
  }
  for (int c = vector_end + threadIdx.x; c < slice.end; c += threads) body(c, Count<1>());
}

__device__ inline uint32_t combine(uint32_t a, uint32_t b) { return max(a, b); }
__device__ inline double combine(double a, double b) { return a + b; }

// The threads that work on one row.
template <bool kCluster>
struct Team {
  uint32_t rank, size;

  // Maximum or sum over the team; every thread gets the same. Also a barrier. `kUse`: no two calls
  // of a kernel may share it.
  template <int kUse, typename V>
  __device__ V reduce(V v) const {
    __shared__ V of_warp[kMaxWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v = combine(v, __shfl_xor_sync(~0u, v, step));
    if (lane == 0) of_warp[warp] = v;
    __syncthreads();
    v = lane < static_cast<int>(blockDim.x) / 32 ? of_warp[lane] : V{};
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v = combine(v, __shfl_xor_sync(~0u, v, step));
    if constexpr (kCluster) {
      __shared__ V of_cta[kMaxCluster];
      if (threadIdx.x < size) {
        store_to(of_cta + rank, threadIdx.x, v);
      }
      __syncwarp();
      ptx::cluster_arrive();
      ptx::cluster_wait();
      v = of_cta[0];
      for (uint32_t r = 1; r < size; ++r) v = combine(v, of_cta[r]);
    }
    return v;
  }

 private:
  template <typename V>
  __device__ static void store_to(V* place, uint32_t cta, V v) {
    ptx::store_remote(ptx::remote_address(ptx::smem_address(place), cta), v);
  }
};

struct SliceParams {
  int width = 0;               // columns of a CTA
  uint32_t inverse_width = 0;  // 2^32 / width, rounded up
};

template <typename Source, bool kCluster>
__global__ void __launch_bounds__(kMaxThreads, 3)
    quantize_computed_rows(const Source source, const QuantizeArgs p, const SliceParams params) {
  extern __shared__ __align__(16) float v[];
  ptx::grid_launch_dependents();
  const int k = static_cast<int>(p.k), padded = static_cast<int>(p.y_stride);
  const Team<kCluster> team{kCluster ? ptx::cluster_rank() : 0u, kCluster ? gridDim.x : 1u};
  const int begin = min(static_cast<int>(team.rank) * params.width, padded);
  const int out_end = min(begin + params.width, padded);
  const Slice slice{begin, min(out_end, k)};
  // No CTA of the cluster may be written to before it runs.
  if constexpr (kCluster) ptx::cluster_arrive();
  source.prefetch(slice);
  const int c0 = begin + static_cast<int>(threadIdx.x) * kOutputs;
  if (p.gather) {
    for (int c = c0; c < slice.end; c += blockDim.x * kOutputs) {
      ptx::prefetch_l2(p.gather + c);
    }
  }
  if constexpr (kCluster) ptx::cluster_wait();
  ptx::grid_dependency_wait();

  const int64_t row = blockIdx.y;
  uint32_t peak = source.compute(v, row, slice, team);
  peak = team.template reduce<1>(peak);

  const float scale = fmaxf(__uint_as_float(peak), 1e-12f) * (1.0f / 448.0f);
  const float inverse = __fdiv_rn(1.0f, scale);
  const bool finite = peak < kInfinityBits;
  if (threadIdx.x == 0 && team.rank == 0) {
    p.scale[row] = finite ? scale : __uint_as_float(0x7FC00000u);
  }
  const uint32_t v_address = ptx::smem_address(v);
  const auto at = [&](int column) {
    if constexpr (kCluster && Source::kRecomputes) {
      return source.value(row, column);
    } else if constexpr (kCluster) {
      const uint32_t owner = __umulhi(static_cast<uint32_t>(column), params.inverse_width);
      const uint32_t offset = static_cast<uint32_t>(column) - owner * params.width;
      return ptx::load_remote(ptx::remote_address(v_address + offset * 4, owner));
    } else {
      return v[column];
    }
  };
  for (int c = c0; c < out_end; c += blockDim.x * kOutputs) {
    float f[kOutputs];
    if (p.gather == nullptr) {
#pragma unroll
      for (int i = 0; i < kOutputs; i += 4) {
        const auto four = load<4>(v + (c - begin) + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) f[i + j] = four.at[j];
      }
    } else if (c + kOutputs <= k && reinterpret_cast<uintptr_t>(p.gather) % 16 == 0) {
      int4 from[kOutputs / 4];
#pragma unroll
      for (int i = 0; i < kOutputs / 4; ++i) {
        from[i] = __ldg(reinterpret_cast<const int4*>(p.gather + c) + i);
      }
      const auto* columns = reinterpret_cast<const int*>(from);
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        f[i] = at(static_cast<uint32_t>(columns[i]) < static_cast<uint32_t>(k) ? columns[i] : 0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        const int column = c + i < k ? __ldg(p.gather + c + i) : 0;
        f[i] = at(static_cast<uint32_t>(column) < static_cast<uint32_t>(k) ? column : 0);
      }
    }
    Vec<uint16_t, kOutputs / 2> out;
#pragma unroll
    for (int i = 0; i < kOutputs; i += 2) {
      uint32_t pair = __nv_cvt_float2_to_fp8x2(
          make_float2(__fmul_rn(f[i], inverse), __fmul_rn(f[i + 1], inverse)), __NV_SATFINITE,
          __NV_E4M3);
      if (!finite) pair = kNanBytes;
      if (c + i >= k) pair = 0;
      if (c + i + 1 >= k) pair &= 0xFF;
      out.at[i / 2] = static_cast<uint16_t>(pair);
    }
    *reinterpret_cast<Vec<uint16_t, kOutputs / 2>*>(p.y + row * p.y_stride + c) = out;
  }
  if constexpr (kCluster && !Source::kRecomputes) {
    // The others may still read this CTA's slice.
    if (p.gather) {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }
}

// `least`: columns from which on a slice is worth a CTA of its own.
template <typename Source>
void launch_rows(const Source& source, const QuantizeArgs& rows, int64_t least, Stream stream) {
  const int64_t multiprocessors = device_info().multiprocessors;
  const int64_t steps = rows.y_stride / kSliceStep;
  int64_t cluster = 1;
  const auto width_of = [&](int64_t ctas) { return (steps + ctas - 1) / ctas * kSliceStep; };
  // A gather inside one CTA reads its own shared memory: splitting it must win much to pay.
  const bool split = !rows.gather || 4 * rows.m <= multiprocessors;
  while (
      cluster < kMaxCluster &&
      (width_of(cluster) * static_cast<int64_t>(sizeof(float)) > kMaxSmem ||
       (split && width_of(2 * cluster) >= least && 2 * cluster * rows.m <= 2 * multiprocessors))) {
    cluster *= 2;
  }
  const int64_t width = width_of(cluster);
  const SliceParams params{static_cast<int>(width),
                           static_cast<uint32_t>(((int64_t{1} << 32) + width - 1) / width)};
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(cluster), static_cast<unsigned>(rows.m));
  // Threads share the columns evenly: a last pass with few of them busy costs a whole one.
  const int64_t vectors = width / kOutputs, passes = (vectors + kMaxThreads - 1) / kMaxThreads;
  const int64_t threads = ((vectors + passes - 1) / passes + 31) / 32 * 32;
  shape.block = dim3(static_cast<unsigned>(threads));
  shape.smem_bytes = static_cast<int>(width * static_cast<int64_t>(sizeof(float)));
  shape.cluster = static_cast<int>(cluster);
  shape.dependent = true;
  auto* kernel =
      cluster > 1 ? &quantize_computed_rows<Source, true> : &quantize_computed_rows<Source, false>;
  if (shape.smem_bytes > 48 * 1024) allow_smem(kernel, kMaxSmem);
  launch(kernel, shape, stream, source, rows, params);
}

template <typename T>
bool aligned_rows(const void* base, int64_t stride) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * sizeof(T) % 16 == 0;
}

}  // namespace
}  // namespace spense::cuda
