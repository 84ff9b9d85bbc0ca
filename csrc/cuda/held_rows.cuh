// SPDX-License-Identifier: Apache-2.0
// Rows that are computed and then quantised, in one pass over memory: threads hold their columns in
// registers from the loads until the scale is known, quantise them, and gather bytes.
//
//   few rows:  a row a CTA, and several that compute the same where there is a gather to share; or
//              a cluster of CTAs that share the columns and give each other all quantised bytes.
//              CTAs are small, so that the GEMMs before and behind them run on the same
//              multiprocessor and copy weights meanwhile
//   many rows: kRows rows at a time, whose bytes of a column lie beside each other in shared
//              memory, so that one random access by the gather serves them all. CTAs stay, keep
//              weight and gather, and load their next rows while they work on these.
//
// A Source holds the inputs and brings
//   Element, Kept, Held       element of the inputs; what stays of 8 columns of a row, of a weight
//   kInputs, kSums            their number; whether rows have a factor that follows from squares
//   kMaxRows, kMaxVectors     what the registers hold
//   kManyVectors              vectors of a thread where there are many rows
//   Few                       threads of quantize_few_rows that have registers for one, two, four
//                             vectors; 0: not taken
//   input(i, m), stride(i)    row m of an input, elements between rows
//   aligned                   whether rows of inputs and weights start at multiples of 16 bytes
//   hold(c, left)             weights of 8 columns, which no kernel before writes
//   take(in, m, c, left, held, squares)   what to keep of 8 columns, of which `left` exist
//   raise(peak, kept)         bits of the largest |kept|
//   factor(squares)           of the row, not negative: v = kept * factor, and that of the largest
//                             |kept| is the largest |v|
#pragma once

#include "cuda/neighbours.h"
#include "cuda/row_bytes.cuh"
#include "cuda/row_exchange.cuh"
#include "device/sharing.h"

namespace spense::cuda {
namespace {

// Of a Source without weights, whose rows need no factor.
struct Weightless {
  struct Held {};
  static constexpr bool kSums = false;

  template <bool>
  __device__ Held hold(int, int) const {
    return {};
  }
};

// Registers of a thread that fit beside a GEMM of few tokens (sm90::Traits::kShares), in each
// quarter of the multiprocessor.
constexpr int left_registers(int threads) {
  const int warps = (threads + 127) / 128, others = device::kSharingThreads / 128;
  return (device::kRegisters / 4 / 32 - others * device::kSharingRegisters) / warps / 8 * 8;
}
constexpr int kGatherVectors = 2;  // of a thread of quantize_few_rows
// Whether CTAs of quantize_held_rows have one group of rows each.
template <int kRows, int kCtas>
constexpr bool kOnce = kRows == 1 && kCtas == 2;

struct Slices {
  int width = 0;    // columns of a CTA
  int outputs = 0;  // columns of y that it writes: fewer where several CTAs compute the same row
  int cluster = 1;
  int stage = 0;  // where rows on their way lie in shared memory
  int ahead = 1;  // turns that rows are loaded ahead, 1 or 2
};

// Rows come through shared memory.
template <int kRows, int kVectors, bool kRegular, bool kOneTurn>
constexpr bool kThroughMemory = kRegular && kRows * kVectors > 1 && !kOneTurn;

// Of shared memory, for the rows that are loaded at once.
template <typename Source, int kRows, int kVectors, int kThreads>
constexpr int kStageBytes =
    Source::kInputs * kRows * kVectors * kThreads * sizeof(Eight<typename Source::Element>);

// Turns that rows are loaded ahead, where there is room.
template <int kRows, int kVectors>
constexpr int kAhead = kRows > 1 && kVectors > 1 ? 2 : 1;

// In lines of 128 bytes, as copies to it are: K = 25600 takes 15 % longer from an odd multiple
// of 16.
extern __shared__ __align__(128) unsigned char row_memory[];

// kRegular: whole, aligned runs of 8 columns, and places of a gather in 16 bits.
// kOneTurn: a CTA has one group of rows, and stays out of shared memory. With many vectors it then
// has no registers for places of a gather.
template <typename Source, int kRows, int kVectors, int kThreads, bool kRegular, bool kOneTurn>
__device__ __forceinline__ void hold_rows(const Source& source, const QuantizeArgs& p,
                                          const Slices& slices) {
  using T = typename Source::Element;
  using Run = Eight<T>;
  constexpr int kInputs = Source::kInputs;
  constexpr bool kStaged = kThroughMemory<kRows, kVectors, kRegular, kOneTurn>;
  static_assert(kRegular || kRows == 1);
  constexpr bool kSums = Source::kSums;
  static_assert(kThreads % 32 == 0);
  constexpr int kPartsWarps = kOneTurn ? kThreads / 32 : kMaxWarps;
  __shared__ Parts<kRows, kSums, kPartsWarps> parts[kOneTurn ? 1 : 2];
  __shared__ uint64_t bytes_arrived;

  ptx::grid_launch_dependents();
  const bool shared_row = kRows == 1 && slices.cluster > 1;
  const Team team{shared_row ? ptx::cluster_rank() : 0u, shared_row ? gridDim.x : 1u};
  const uint32_t arrived = ptx::smem_address(&bytes_arrived);
  for (auto& each : parts) each.init();
  if (shared_row) {
    if (threadIdx.x == 0) {
      ptx::barrier_init(arrived, 1);
      ptx::barrier_init_fence();
    }
    // Zeros before other CTAs write, and no CTA may be written to before it runs.
    __syncthreads();
    ptx::cluster_arrive_relaxed();
  }
  const int k = static_cast<int>(p.k), padded = static_cast<int>(p.y_stride);
  const int begin = min(static_cast<int>(team.rank) * slices.width, padded);
  const int end = min(begin + slices.width, padded);
  constexpr bool kGathers = !kOneTurn || kVectors <= kGatherVectors;
  constexpr bool kShares = kRows * kVectors == 1;  // whether CTAs may compute the same row
  const int first_output =
      !kShares || shared_row ? begin : static_cast<int>(blockIdx.x) * slices.outputs;
  const int outputs_end = kShares ? min(first_output + slices.outputs, end) : end;
  int columns[kVectors], outputs[kVectors];
  typename Source::Held held[kVectors];
  Places places[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int offset = static_cast<int>(v * blockDim.x + threadIdx.x) * kColumns;
    columns[v] = begin + offset;
    outputs[v] = first_output + offset;
    held[v] = source.template hold<kRegular>(columns[v], min(end, k) - columns[v]);
    if (kRegular && kGathers && p.gather && outputs[v] < outputs_end) {
      places[v].set(read_gather<kRows, kRegular>(p, outputs[v]));
    }
  }
  // Each thread's runs of the rows on their way; nobody else reads them.
  const int ahead = kAhead<kRows, kVectors> > 1 ? slices.ahead : 1;
  constexpr int kRunBytes = static_cast<int>(sizeof(Run));
  unsigned char* const stage = row_memory + slices.stage + threadIdx.x * kRunBytes;
  const auto slot = [&](uint32_t turn, int input, int r, int v) {
    const uint32_t at = (turn & (ahead - 1u)) * kInputs + input;
    return stage + ((at * kRows + r) * kVectors + v) * (kThreads * kRunBytes);
  };
  if constexpr (kStaged) {
    // What is not loaded shall not be NaN.
#pragma unroll
    for (int i = 0; i < ahead * kInputs * kRows * kVectors; ++i) {
      *reinterpret_cast<Run*>(stage + i * (kThreads * kRunBytes)) = Run{};
    }
  }
  const int64_t m = p.m, step = int64_t{gridDim.y} * kRows, first_row = int64_t{blockIdx.y} * kRows;
  const T* next[kInputs];  // what is loaded next, unless through shared memory
  if constexpr (!kStaged) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      next[i] = source.input(i, first_row) + columns[0];
      ptx::pin(next[i]);
    }
  }
  if constexpr (kSums && kRows == 1) finish(held[0]);
  if (shared_row) {
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
  ptx::grid_dependency_wait();

  const auto fetch = [&](uint32_t turn, int64_t row) {
#pragma unroll
    for (int input = 0; input < kInputs; ++input) {
      const T* from = source.input(input, row);
#pragma unroll
      for (int r = 0; r < kRows; ++r, from += source.stride(input)) {
        if (row + r >= m) break;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          if (columns[v] >= min(end, k)) continue;
#pragma unroll
          for (int i = 0; i < kRunBytes; i += 16) {
            ptx::copy_async(ptx::smem_address(slot(turn, input, r, v) + i),
                            reinterpret_cast<const unsigned char*>(from + columns[v]) + i);
          }
        }
      }
    }
  };
  if constexpr (kStaged) {
    fetch(0, first_row);
    if (ahead == 2) {
      ptx::copy_async_commit();
      fetch(1, first_row + step);
    }
  }

  uint32_t turn = 0;
  for (int64_t row = first_row; row < m; row += step, ++turn) {
    const int rows = kRows == 1 ? 1 : static_cast<int>(min(m - row, int64_t{kRows}));
    if constexpr (kStaged) {
      ptx::copy_async_commit();
      ahead == 2 ? ptx::copy_async_wait<1>() : ptx::copy_async_wait<0>();
    }
    Run in[kRows][kVectors][kInputs];
    typename Source::Kept kept[kRows][kVectors];
    Found found[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int input = 0; input < kInputs; ++input) {
          if constexpr (kStaged) {
            in[r][v][input] = *reinterpret_cast<const Run*>(slot(turn, input, r, v));
          } else {
            const T* from = next[input] + (columns[v] - columns[0]);
            in[r][v][input] = load_columns<kOneTurn ? Reuse::kUnknown : Reuse::kNever, kRegular>(
                from, min(end, k) - columns[v]);
            if (v == kVectors - 1) next[input] += step * source.stride(input);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const bool owned = r < rows && (!kShares || shared_row || blockIdx.x == 0);
        const int left = owned ? min(end, k) - columns[v] : 0;
        kept[r][v] = source.template take<kRegular>(in[r][v], row + r, columns[v], left, held[v],
                                                    found[r].squares);
      }
    }

    // Not before: copies that queue would hold up the arithmetic above.
    if constexpr (kStaged) {
      if (row + ahead * step < m) fetch(turn, row + ahead * step);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kStaged) finish(kept[r][v]);
        source.raise(found[r].peak, kept[r][v]);
      }
    }

    const Found all = exchange(found, team, parts[kOneTurn ? 0 : turn & 1], turn >> 1 & 1);
    float peak = __uint_as_float(all.peak), factor[kRows] = {};
    if constexpr (kSums) {
      const float mine = source.factor(all.squares);
      peak = __fmul_rn(peak, mine);
      spread_rows(mine, factor);
    }
    const float scale = scale_of(peak);
    constexpr unsigned kLanes = 32 / kRows;
    const unsigned of_row = threadIdx.x / kLanes;
    if (threadIdx.x % kLanes == 0 && blockIdx.x == 0 && of_row < static_cast<unsigned>(rows)) {
      p.scale[row + of_row] = scale;
    }
    float inverse[kRows];
    spread_rows(__frcp_rn(scale), inverse);
    const auto quantised = [&](int r, int v, int i) {
      float value = kept[r][v].get(i);
      if constexpr (kSums) value = __fmul_rn(value, factor[r]);
      return __fmul_rn(value, inverse[r]);
    };
    const auto bytes_of_row = [&](int r, int v) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = fp8_pair(quantised(r, v, 2 * i), quantised(r, v, 2 * i + 1));
      }
      return Bytes8{pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16};
    };
    const auto store = [&](int v, const Bytes8(&bytes)[kRows]) {
      uint8_t* to = p.y + row * p.y_stride + outputs[v];
#pragma unroll
      for (int r = 0; r < kRows; ++r, to += p.y_stride) {
        if (r < rows) store_bytes<kRegular>(to, k - outputs[v], bytes[r]);
      }
    };
    if (!kGathers || p.gather == nullptr) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (columns[v] >= end) continue;
        Bytes8 bytes[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) bytes[r] = bytes_of_row(r, v);
        store(v, bytes);
      }
      continue;
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int c = columns[v];
      if (c >= end) continue;
      if constexpr (kRows == 1) {
        *reinterpret_cast<Bytes8*>(row_memory + c) = bytes_of_row(0, v);
      } else {
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
    if (shared_row) ptx::async_proxy_fence();
    __syncthreads();
    if (shared_row) {
      const auto mine = static_cast<uint32_t>(end - begin);
      if (threadIdx.x == 0) ptx::barrier_arrive_expect(arrived, padded - mine);
      if (threadIdx.x < team.size && threadIdx.x != team.rank && mine > 0) {
        const uint32_t from = ptx::smem_address(row_memory + begin);
        ptx::copy_to_cluster(ptx::remote_address(from, threadIdx.x), from, mine,
                             ptx::remote_address(arrived, threadIdx.x));
      }
      __syncwarp();
      ptx::barrier_wait(arrived, turn & 1);
      ptx::cluster_arrive_relaxed();  // this CTA has got everything
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (outputs[v] >= outputs_end) continue;
      Bytes8 bytes[kRows];
      if constexpr (kRegular) {
        gather_bytes<kRows>(row_memory, places[v].get(), bytes);
      } else {
        gather_bytes<kRows>(row_memory, read_gather<kRows, kRegular>(p, outputs[v]), bytes);
      }
      store(v, bytes);
    }
    if (shared_row) ptx::cluster_wait();  // others have got what this CTA gives
  }
}

// Of a multiprocessor kCtas at a time.
template <typename Source, int kRows, int kVectors, int kThreads, int kCtas, bool kRegular>
__global__ void __launch_bounds__(kThreads, kCtas)
    quantize_held_rows(const Source source, const QuantizeArgs p, const Slices slices) {
  hold_rows<Source, kRows, kVectors, kThreads, kRegular, kOnce<kRows, kCtas>>(source, p, slices);
}

// With what a GEMM of few tokens leaves of the registers.
template <typename Source, int kVectors, int kThreads>
__global__ void __maxnreg__(left_registers(kThreads))
    quantize_few_rows(const Source source, const QuantizeArgs p, const Slices slices) {
  hold_rows<Source, 1, kVectors, kThreads, true, true>(source, p, slices);
}

}  // namespace
}  // namespace spense::cuda
