// SPDX-License-Identifier: Apache-2.0
// Rows that are computed and then quantised, in one pass over memory: threads hold their columns in
// registers from the loads until the scale is known, quantise them, and gather bytes.
//
//   few rows:  a row a CTA, or a cluster of CTAs that share its columns and give each other all
//              quantised bytes
//   many rows: kRows rows at a time, whose bytes of a column lie beside each other in shared
//              memory, so that one random access by the gather serves them all. CTAs stay, keep
//              weight and gather, and load their next rows while they work on these.
//
// A Source holds the inputs and brings
//   Element, Kept, Held       element of the inputs; what stays of 8 columns of a row, of a weight
//   kSums                     whether a factor that follows from the sum of squares comes in
//   kMaxRows, kMaxVectors     what the registers hold
//   inputs(), row(i, m)       how many inputs, and row m of one
//   hold(c, k)                weights of 8 columns, which no kernel before writes
//   take(in, m, c, k, squares) what to keep of 8 columns
//   factor(sum)               of the row
//   raise(peak, kept, factor, held), value(kept, i, factor, held)   bits of |v|; v
#pragma once

#include "cuda/neighbours.h"
#include "cuda/row_bytes.cuh"
#include "cuda/row_exchange.cuh"
#include "device/launch.h"

namespace spense::cuda {
namespace {

constexpr int kSliceStep = 128;  // slices are multiples of this many columns
constexpr int64_t kNearColumns = 1 << 16;

struct Slices {
  int width = 0;  // columns of a CTA
  int cluster = 1;
  int stage = 0;  // where rows on their way lie in shared memory, 0: loads go to registers
};

template <typename Source, int kRows, int kVectors, int kThreads, int kCtas>
__global__ void __launch_bounds__(kThreads, kCtas)
    quantize_held_rows(const Source source, const QuantizeArgs p, const Slices slices) {
  using T = typename Source::Element;
  using Loaded = Eight<T>;
  constexpr int kCopies = sizeof(Loaded) / 16;
  constexpr bool kStages = kRows * kVectors > 1;
  __shared__ Parts<uint32_t, kRows> peaks[2];
  __shared__ Parts<double, kRows> sums;
  __shared__ uint64_t bytes_arrived;

  ptx::grid_launch_dependents();
  const bool shared_row = kRows == 1 && slices.cluster > 1;
  const Team team{shared_row ? ptx::cluster_rank() : 0u, shared_row ? gridDim.x : 1u};
  if (shared_row) {
    // No CTA of the cluster may be written to before it runs.
    if (threadIdx.x == 0) {
      sums.init();
      for (auto& each : peaks) each.init();
      ptx::barrier_init(ptx::smem_address(&bytes_arrived), 1);
      ptx::barrier_init_fence();
    }
    __syncwarp();
    ptx::cluster_arrive_relaxed();
  }
  const int k = static_cast<int>(p.k), padded = static_cast<int>(p.y_stride);
  const int begin = min(static_cast<int>(team.rank) * slices.width, padded);
  const int end = min(begin + slices.width, padded);
  const auto column = [&](int v) {
    return begin + static_cast<int>(v * blockDim.x + threadIdx.x) * kColumns;
  };
  const bool near = kRows > 1 || k <= kNearColumns;
  typename Source::Held held[kVectors];
  Places places[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int c = column(v);
    if (c >= end) continue;
    held[v] = source.hold(c, k);
    if (p.gather && near) {
      int wide[kColumns];
      read_gather<kRows>(p, c, wide);
#pragma unroll
      for (int i = 0; i < kColumns; i += 2) places[v].pairs[i / 2] = wide[i] | wide[i + 1] << 16;
    }
  }
  if (shared_row) ptx::cluster_wait();
  ptx::grid_dependency_wait();

  const uint32_t arrived = ptx::smem_address(&bytes_arrived);
  const int inputs = source.inputs();
  const int64_t groups = (p.m + kRows - 1) / kRows;
  const auto row_of = [&](int64_t group, int r) { return min(group * kRows + r, p.m - 1); };
  const auto slot = [&](int input, int r, int c) {
    const int at = (input * kRows + r) * slices.width + (c - begin);
    return row_memory + slices.stage + at * static_cast<int>(sizeof(T));
  };
  const auto fetch_input = [&](int input, int64_t group) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int c = column(v);
      if (c >= end || c + kColumns > k) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto* from = reinterpret_cast<const uint4*>(source.row(input, row_of(group, r)) + c);
        const uint32_t to = ptx::smem_address(slot(input, r, c));
#pragma unroll
        for (int i = 0; i < kCopies; ++i) ptx::copy_async(to + i * 16, from + i);
      }
    }
  };
  const auto fetch = [&](int64_t group) {
    if (!kStages || !slices.stage || group >= groups) return;
    fetch_input(0, group);
    if (inputs > 1) fetch_input(1, group);
  };
  fetch(blockIdx.y);

  uint32_t turn = 0;
  for (int64_t group = blockIdx.y; group < groups; group += gridDim.y, ++turn) {
    Loaded in[kRows][kVectors][2];
    if (kStages && slices.stage) ptx::copy_async_wait();
    const auto load_input = [&](int input) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int c = column(v);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (c >= end) {
            in[r][v][input] = Loaded{};
          } else if (kStages && slices.stage && c + kColumns <= k) {
            in[r][v][input] = *reinterpret_cast<const Loaded*>(slot(input, r, c));
          } else {
            const T* from = source.row(input, row_of(group, r)) + c;
            in[r][v][input] = load_columns<Reuse::kNever>(from, k - c, source.aligned);
          }
        }
      }
    };
    load_input(0);
    if (inputs > 1) load_input(1);

    typename Source::Kept kept[kRows][kVectors];
    double squares[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = group * kRows + r;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int c = column(v);
        const bool owned = c < end && row < p.m;
        kept[r][v] = source.take(in[r][v], row, c, owned ? k - c : 0, squares[r]);
      }
    }
    fetch(group + gridDim.y);

    float factor[kRows] = {};
    if constexpr (Source::kSums) {
      const float mine = source.factor(sum_rows(squares, team, sums, turn & 1));
#pragma unroll
      for (int r = 0; r < kRows; ++r) factor[r] = __shfl_sync(~0u, mine, r * (32 / kRows));
    }
    const auto forget = [&] {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (Source::kSums) forget_derived(held[v]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) forget_derived(kept[r][v]);
      }
    };
    forget();
    uint32_t peak[kRows] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(v) >= end) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        peak[r] = source.raise(peak[r], kept[r][v], factor[r], held[v]);
      }
    }
    max_rows(peak, team, peaks[turn & 1], turn >> 1 & 1);
    forget();

    float inverse[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float scale = scale_of(peak[r]);
      inverse[r] = __fdiv_rn(1.0f, scale);
      const int64_t row = group * kRows + r;
      if (threadIdx.x == static_cast<unsigned>(r) && team.rank == 0 && row < p.m)
        p.scale[row] = scale;
    }
    const auto quantised = [&](int r, int v, int i) {
      return __fmul_rn(source.value(kept[r][v], i, factor[r], held[v]), inverse[r]);
    };
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int c = column(v);
      if (c >= end) continue;
      if (p.gather == nullptr || kRows == 1) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          uint32_t pairs[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            pairs[i] = fp8_pair(quantised(r, v, 2 * i), quantised(r, v, 2 * i + 1));
          }
          const Bytes8 bytes{pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16};
          const int64_t row = group * kRows + r;
          if (p.gather == nullptr) {
            if (row < p.m) store_bytes(p, row, c, bytes);
          } else if (!shared_row) {
            *reinterpret_cast<Bytes8*>(row_memory + c) = bytes;
          } else {
            const uint32_t to = ptx::smem_address(row_memory + c);
            const uint64_t both = bytes.low | static_cast<uint64_t>(bytes.high) << 32;
            for (uint32_t cta = 0; cta < team.size; ++cta) {
              ptx::store_async(ptx::remote_address(to, cta), both,
                               ptx::remote_address(arrived, cta));
            }
          }
        }
      } else if constexpr (kRows > 1) {
        uint32_t words[kColumns * kRows / 4];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
#pragma unroll
          for (int r = 0; r < kRows; r += 2) {
            const uint32_t pair = fp8_pair(quantised(r, v, i), quantised(r + 1, v, i));
            const int at = i * kRows + r;
            words[at / 4] = at % 4 == 0 ? pair : words[at / 4] | pair << 16;
          }
        }
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) {
          *reinterpret_cast<uint4*>(row_memory + place_of<kRows>(c + i * 16 / kRows)) =
              *reinterpret_cast<const uint4*>(words + 4 * i);
        }
      }
    }
    if (p.gather == nullptr) continue;
    if (shared_row) {
      if (threadIdx.x == 0) ptx::barrier_arrive_expect(arrived, static_cast<uint32_t>(padded));
      ptx::barrier_wait(arrived, turn & 1);
    } else {
      __syncthreads();
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int c = column(v);
      if (c >= end) continue;
      int from[kColumns];
      if (near) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
          from[i] = places[v].pairs[i / 2] >> (16 * (i % 2)) & 0xFFFF;
      } else {
        read_gather<kRows>(p, c, from);
      }
      Bytes8 bytes[kRows];
      gather_bytes<kRows>(from, bytes);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = group * kRows + r;
        if (row < p.m) store_bytes(p, row, c, bytes[r]);
      }
    }
  }
}

template <typename Source, int kRows, int kVectors, int kThreads, int kCtas>
void launch_held(const Source& source, const QuantizeArgs& rows, int cluster, Stream stream) {
  const int64_t steps = rows.y_stride / kSliceStep;
  Slices slices;
  slices.cluster = cluster;
  slices.width = static_cast<int>((steps + cluster - 1) / cluster * kSliceStep);
  LaunchShape shape;
  const int64_t vectors = slices.width / kColumns;
  shape.block = dim3(static_cast<unsigned>(((vectors + kVectors - 1) / kVectors + 31) / 32 * 32));
  shape.cluster = cluster;
  shape.dependent = true;
  int64_t smem = rows.gather ? kRows * rows.y_stride : 16;
  int64_t groups = (rows.m + kRows - 1) / kRows;
  if constexpr (kRows * kVectors > 1) {
    const int64_t resident = int64_t{device_info().multiprocessors} * kCtas;
    const int64_t staged = smem + int64_t{source.inputs()} * kRows * slices.width *
                                      static_cast<int64_t>(sizeof(typename Source::Element));
    if (groups > resident && cluster == 1 && source.aligned && staged <= kMaxSmem / kCtas) {
      slices.stage = static_cast<int>(smem);
      smem = staged;
      groups = resident;
    }
  }
  shape.grid = dim3(static_cast<unsigned>(cluster),
                    static_cast<unsigned>(std::min<int64_t>(groups, kMaxGridRows)));
  shape.smem_bytes = static_cast<int>(smem);
  auto* kernel = &quantize_held_rows<Source, kRows, kVectors, kThreads, kCtas>;
  if (smem > 48 * 1024) allow_smem(kernel, kMaxSmem);
  launch(kernel, shape, stream, source, rows, slices);
}

// `least`: columns that are worth a CTA of their own.
template <typename Source>
void launch_rows(const Source& source, const QuantizeArgs& rows, int64_t least, Stream stream) {
  constexpr int kMost = 1024, kNarrow = 640;  // threads of a CTA; of one of two an SM
  const int64_t multiprocessors = device_info().multiprocessors, columns = rows.y_stride;
  if (rows.m >= 2 * multiprocessors && columns <= kMost * kColumns) {
    const bool narrow = columns <= kNarrow * kColumns;
    if constexpr (Source::kMaxRows >= 4) {
      if (rows.m >= 12 * multiprocessors) {
        return narrow ? launch_held<Source, 4, 1, kNarrow, 2>(source, rows, 1, stream)
                      : launch_held<Source, 4, 1, kMost, 1>(source, rows, 1, stream);
      }
    }
    return narrow ? launch_held<Source, 2, 1, kNarrow, 2>(source, rows, 1, stream)
                  : launch_held<Source, 2, 1, kMost, 1>(source, rows, 1, stream);
  }
  constexpr int kWide = 896;  // threads that have registers for four vectors
  constexpr int64_t kLongest =
      kColumns * (Source::kMaxVectors >= 4 ? 4 * kWide : Source::kMaxVectors * kMost);
  static_assert(kMaxFusedColumns <= kMaxCluster * kLongest);
  int cluster = 1;
  const auto width = [&] { return (columns / kSliceStep + cluster - 1) / cluster * kSliceStep; };
  while (cluster < kMaxCluster &&
         (width() > kLongest || (width() > least && 2 * cluster * rows.m <= multiprocessors))) {
    cluster *= 2;
  }
  if (width() <= kColumns * kNarrow) {
    return launch_held<Source, 1, 1, kNarrow, 2>(source, rows, cluster, stream);
  }
  if (width() <= kColumns * kMost) {
    return launch_held<Source, 1, 1, kMost, 1>(source, rows, cluster, stream);
  }
  if (Source::kMaxVectors < 4 || width() <= 2 * kColumns * kMost) {
    return launch_held<Source, 1, 2, kMost, 1>(source, rows, cluster, stream);
  }
  if constexpr (Source::kMaxVectors >= 4) {
    launch_held<Source, 1, 4, kWide, 1>(source, rows, cluster, stream);
  }
}

}  // namespace
}  // namespace spense::cuda
