// SPDX-License-Identifier: Apache-2.0
// quantize_fp8: a CTA holds kRows whole rows of x in shared memory, column by column with the rows
// of a column beside each other, so that one random access by the gather serves them all.
//
//   few rows:  grid (slices of the columns, rows), one row a CTA; every slice reads the whole row
//              for its maximum, which costs L2 reads and saves a second pass
//   many rows: 4 or 8 bytes a column, one slice
//   rows too long for shared memory: one row a CTA, the second read comes from L2
#include <cuda_fp8.h>

#include "cuda/rows.cuh"
#include "device/launch.h"
#include "device/ptx.cuh"

namespace spense::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kRowPad = 128;         // rows of y are this multiple long
constexpr int kSliceColumns = 1024;  // no slice is worth less
constexpr uint16_t kNanPair = 0x7F7F;

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

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

// Rows of x in shared memory. A thread fills kLoad neighbouring columns in 16-byte slots;
// exchanging slots inside that run spreads what the lanes of a warp write at once over all banks.
template <typename T, int kRows>
struct Tile {
  using Column = Pack<T, kRows>;
  static constexpr int kLoad = 16 / sizeof(T);  // columns of a 16-byte read
  static constexpr int kSlotColumns = 16 / sizeof(Column);
  static constexpr int kSlots = kLoad / kSlotColumns;  // of a run: as many as rows
  Column* columns;

  // 8 slots fill all banks once.
  __device__ static int slot(int index) { return index ^ (index / 8 & (kSlots - 1)); }
  __device__ Column& operator[](int column) const {
    return columns[slot(column / kSlotColumns) * kSlotColumns + column % kSlotColumns];
  }

  // Columns c to c + kLoad of all rows, c a multiple of kLoad.
  __device__ void fill(int c, const uint4 (&rows)[kRows]) const {
    alignas(16) Column run[kLoad];
#pragma unroll
    for (int i = 0; i < kLoad; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) run[i].at[r] = reinterpret_cast<const T*>(&rows[r])[i];
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      reinterpret_cast<uint4*>(columns)[slot(c / kSlotColumns + i)] =
          reinterpret_cast<const uint4*>(run)[i];
    }
  }
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

// Where columns c to c + kVector come from; those behind the last come from column 0.
template <int kVector>
__device__ void read_sources(const QuantizeArgs& p, int c, int (&from)[kVector]) {
  const int k = static_cast<int>(p.k);
  if (p.gather && c + kVector <= k && reinterpret_cast<uintptr_t>(p.gather) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      const int4 four = __ldg(reinterpret_cast<const int4*>(p.gather + c + i));
      from[i] = four.x, from[i + 1] = four.y, from[i + 2] = four.z, from[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      from[i] = c + i < k && p.gather ? __ldg(p.gather + c + i) : c + i;
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    from[i] = static_cast<uint32_t>(from[i]) < static_cast<uint32_t>(k) ? from[i] : 0;
  }
}

// kVector: columns that one thread writes at once. kStaged: rows go through shared memory.
template <typename T, int kRows, int kVector, bool kStaged>
__global__ void __launch_bounds__(kThreads, 2) quantize_rows(const QuantizeArgs p) {
  static_assert(kStaged || kRows == 1);
  static_assert(kRowPad % kVector == 0 && kVector % 4 == 0);
  extern __shared__ __align__(16) unsigned char smem[];
  using Rows = Tile<T, kRows>;
  using Column = typename Rows::Column;
  constexpr int kLoad = Rows::kLoad;
  constexpr int kWords = 4;
  const Rows tile{reinterpret_cast<Column*>(smem)};

  ptx::grid_launch_dependents();
  const int k = static_cast<int>(p.k), pads = static_cast<int>(p.y_stride) / kRowPad;
  const int slices = static_cast<int>(gridDim.x);
  const int width = (pads + slices - 1) / slices * kRowPad;
  const int begin = static_cast<int>(blockIdx.x) * width;
  const int end = min(begin + width, pads * kRowPad);
  constexpr int kStep = kThreads * kVector;
  int c_out = begin + static_cast<int>(threadIdx.x) * kVector;
  int from[kVector];
  // Like a weight, the gather is not written by a kernel that lets this one start early.
  if (c_out < end) read_sources(p, c_out, from);
  ptx::grid_dependency_wait();

  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kRows;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRows), p.m - row0));
  const T* x = static_cast<const T*>(p.x) + row0 * p.x_stride;
  uint32_t peak[kRows] = {};
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_stride % kLoad == 0;
  const int vector_end = aligned ? k / kLoad * kLoad : 0;
#pragma unroll(kRows > 2 ? 2 : 4)
  for (int c = static_cast<int>(threadIdx.x) * kLoad; c < vector_end; c += kThreads * kLoad) {
    uint4 row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row[r] = *reinterpret_cast<const uint4*>(x + (r < rows ? r : 0) * p.x_stride + c);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto* words = reinterpret_cast<const uint32_t*>(&row[r]);
#pragma unroll
      for (int i = 0; i < kWords; ++i) peak[r] = larger<T>(peak[r], words[i]);
    }
    if constexpr (kStaged) tile.fill(c, row);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) peak[r] = float_bits<T>(peak[r]);
  for (int c = vector_end + static_cast<int>(threadIdx.x); c < k; c += kThreads) {
    Column column;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      column.at[r] = x[(r < rows ? r : 0) * p.x_stride + c];
      peak[r] = max(peak[r], __float_as_uint(to_float(column.at[r])) & 0x7FFFFFFFu);
    }
    if constexpr (kStaged) tile[c] = column;
  }
  reduce_max(peak);  // also the barrier between filling the columns and reading them

  float inverse[kRows];
  bool finite = true;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float scale = fmaxf(__uint_as_float(peak[r]), 1e-12f) * (1.0f / 448.0f);
    inverse[r] = __fdiv_rn(1.0f, scale);
    finite &= peak[r] < kInfinityBits;
    if (threadIdx.x == 0 && blockIdx.x == 0 && r < rows) {
      p.scale[row0 + r] = peak[r] < kInfinityBits ? scale : __uint_as_float(0x7FC00000u);
    }
  }

  while (c_out < end) {
    Column column[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if constexpr (kStaged) {
        column[i] = tile[from[i]];
      } else {
        column[i].at[0] = x[from[i]];
      }
    }
    const int c = c_out;
    c_out += kStep;
    if (c_out < end) read_sources(p, c_out, from);

    Pack<uint16_t, kVector / 2> out[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kVector; i += 2) {
        const float2 pair = make_float2(to_float(column[i].at[r]) * inverse[r],
                                        to_float(column[i + 1].at[r]) * inverse[r]);
        out[r].at[i / 2] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
      }
    }
    if (!finite) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kVector / 2; ++i) {
          if (peak[r] >= kInfinityBits) out[r].at[i] = kNanPair;
        }
      }
    }
    if (c + kVector > k) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kVector; i += 2) {
          const uint32_t mask = (c + i < k ? 0xFFu : 0u) | (c + i + 1 < k ? 0xFF00u : 0u);
          out[r].at[i / 2] &= static_cast<uint16_t>(mask);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      *reinterpret_cast<Pack<uint16_t, kVector / 2>*>(p.y + (row0 + r) * p.y_stride + c) = out[r];
    }
  }
}

template <typename T>
void run(const QuantizeArgs& args, Stream stream) {
  constexpr int kManyRows = 8 / sizeof(T);
  const int64_t multiprocessors = device_info().multiprocessors;
  // Whole 16-byte reads, so that columns that moved within one stay inside.
  const int64_t row_bytes = (args.k * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
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
  // More rows a CTA once that leaves every multiprocessor its share of CTAs.
  if (args.m >= 2 * kManyRows * multiprocessors && kManyRows * row_bytes <= kMaxSmem) {
    go(&quantize_rows<T, kManyRows, 8, true>, kManyRows, 1, kManyRows * row_bytes);
    return;
  }
  if constexpr (sizeof(T) == 2) {
    if (args.m >= 2 * multiprocessors && 2 * row_bytes <= kMaxSmem) {
      go(&quantize_rows<T, 2, 8, true>, 2, 1, 2 * row_bytes);
      return;
    }
  }
  // Multiprocessors without a CTA let the next kernel start early there.
  const int64_t slices = std::clamp<int64_t>(multiprocessors / args.m, 1,
                                             (args.y_stride + kSliceColumns - 1) / kSliceColumns);
  if (row_bytes <= kMaxSmem) {
    go(&quantize_rows<T, 1, 4, true>, 1, slices, row_bytes);
  } else {
    go(&quantize_rows<T, 1, 4, false>, 1, slices, 0);
  }
}

}  // namespace

void quantize_fp8(const QuantizeArgs& args, Stream stream) {
  for_parts(args, [&](const QuantizeArgs& part, int64_t) {
    with_type(args.in, [&]<typename T>() { run<T>(part, stream); });
  });
}

}  // namespace spense::cuda
