// SPDX-License-Identifier: Apache-2.0
// Which instance of quantize_held_rows runs, and its grid.
#pragma once

#include "cuda/held_rows.cuh"
#include "device/launch.h"

namespace spense::cuda {
namespace {

constexpr int kSliceStep = 128;  // slices are multiples of this many columns
constexpr int64_t kNearColumns = 1 << 16;
// Tokens of the GEMM's tiles that leave registers, and bytes that they leave for those of a row.
constexpr int64_t kFewRows = 64, kLeftBytes = 8192;

// Columns and CTAs of a row, threads and shared memory of a CTA for its quantised bytes.
inline LaunchShape shape_of(const QuantizeArgs& rows, int cluster, int vectors, bool shares,
                            Slices& slices) {
  constexpr int64_t kLeastOutputs = 1024;
  const int64_t steps = rows.y_stride / kSliceStep;
  slices.cluster = cluster;
  slices.width = static_cast<int>((steps + cluster - 1) / cluster * kSliceStep);
  slices.outputs = slices.width;
  int64_t ctas = cluster;
  if (shares && cluster == 1 && rows.gather) {
    // Random reads of shared memory take their time, but so does reading a row several times.
    constexpr int64_t kIdle = 8;  // multiprocessors without work for each CTA
    ctas = std::clamp<int64_t>(device_info().multiprocessors / (kIdle * rows.m), 1,
                               slices.width / kLeastOutputs + 1);
    slices.outputs = static_cast<int>((steps + ctas - 1) / ctas * kSliceStep);
  }
  LaunchShape shape;
  const int runs = slices.width / kColumns;
  shape.block = dim3(static_cast<unsigned>(((runs + vectors - 1) / vectors + 31) / 32 * 32));
  shape.grid.x = static_cast<unsigned>(ctas);
  shape.cluster = cluster;
  shape.dependent = true;
  return shape;
}

template <typename Source, int kRows, int kVectors, int kThreads, int kCtas, bool kRegular>
void launch_held(const Source& source, const QuantizeArgs& rows, int cluster, Stream stream) {
  Slices slices;
  LaunchShape shape = shape_of(rows, cluster, kVectors, kRows * kVectors == 1, slices);
  int64_t smem = rows.gather ? kRows * rows.y_stride : 0;
  int64_t groups = std::min<int64_t>((rows.m + kRows - 1) / kRows, kMaxGridRows);
  if constexpr (kThroughMemory<kRows, kVectors, kRegular, kOnce<kRows, kCtas>>) {
    constexpr int64_t kBytes = kStageBytes<Source, kRows, kVectors, kThreads>;
    static_assert(kBytes + kNearColumns <= kMaxSmem);
    if (cluster == 1) {
      groups = std::min(groups, int64_t{device_info().multiprocessors} * kCtas);
    }
    const bool stays = groups * kRows < rows.m;
    slices.stage = static_cast<int>(smem);
    slices.ahead = stays && smem + 2 * kBytes <= kMaxSmem / kCtas ? kAhead<kRows, kVectors> : 1;
    smem += slices.ahead * kBytes;
  }
  shape.grid.y = static_cast<unsigned>(groups);
  shape.smem_bytes = static_cast<int>(smem);
  auto* kernel = &quantize_held_rows<Source, kRows, kVectors, kThreads, kCtas, kRegular>;
  if (smem > 40 * 1024) allow_smem(kernel, kMaxSmem);  // 48 KiB are free, with the static part
  launch(kernel, shape, stream, source, rows, slices);
}

// Beside GEMMs of few tokens, in what they leave of a multiprocessor.
template <typename Source, int kVectors, int kThreads>
void launch_few(const Source& source, const QuantizeArgs& rows, int cluster, Stream stream) {
  Slices slices;
  LaunchShape shape = shape_of(rows, cluster, kVectors, kVectors == 1, slices);
  shape.grid.y = static_cast<unsigned>(rows.m);
  shape.smem_bytes = rows.gather ? static_cast<int>(rows.y_stride) : 0;
  launch(&quantize_few_rows<Source, kVectors, kThreads>, shape, stream, source, rows, slices);
}

// `least`: columns that are worth a CTA of their own.
template <typename Source>
void launch_rows(const Source& source, const QuantizeArgs& rows, int64_t least, Stream stream) {
  if (rows.m == 0) return;
  constexpr int kMost = 1024, kNarrow = 640;  // threads of a CTA; of one of two an SM
  constexpr int kWide = 896;                  // threads that have registers for four vectors
  const int64_t multiprocessors = device_info().multiprocessors, columns = rows.y_stride;
  const bool regular = rows.k % kColumns == 0 && rows.k <= kNearColumns && source.aligned &&
                       reinterpret_cast<uintptr_t>(rows.gather) % 16 == 0;
  if (regular && rows.m >= 2 * multiprocessors && columns <= kMost * kColumns) {
    const bool narrow = columns <= kNarrow * kColumns;
    constexpr int kVectors = Source::kManyVectors;
    // Of an SM, where rows are narrow and one vector a thread will do.
    constexpr int kCtas = kVectors;
    if constexpr (Source::kMaxRows >= 4) {
      if (rows.m >= 12 * multiprocessors) {
        return narrow ? launch_held<Source, 4, 1, kNarrow, kCtas, true>(source, rows, 1, stream)
                      : launch_held<Source, 4, kVectors, kMost / kVectors, 1, true>(source, rows, 1,
                                                                                    stream);
      }
    }
    return narrow ? launch_held<Source, 2, 1, kNarrow, 2, true>(source, rows, 1, stream)
                  : launch_held<Source, 2, kVectors, kMost / kVectors, kVectors, true>(source, rows,
                                                                                       1, stream);
  }
  constexpr int64_t kLongest =
      kColumns * (Source::kMaxVectors >= 4 ? 4 * kWide : Source::kMaxVectors * kMost);
  static_assert(kMaxFusedColumns <= kMaxCluster * kLongest);
  int cluster = 1;
  const auto width = [&] { return (columns / kSliceStep + cluster - 1) / cluster * kSliceStep; };
  const auto pays = [&] {
    // Clusters of eight want room beside them; of four, 30 run at a time on 132 multiprocessors.
    const int64_t room = 2 * cluster == kMaxCluster ? multiprocessors / 2
                         : 2 * cluster == 4         ? multiprocessors * 10 / 11
                                                    : multiprocessors;
    return width() > least && 2 * cluster * rows.m <= room;
  };
  while (cluster < kMaxCluster && (width() > kLongest || pays())) cluster *= 2;
  const auto go = [&]<int kVectors, int kThreads, int kCtas>() {
    regular
        ? launch_held<Source, 1, kVectors, kThreads, kCtas, true>(source, rows, cluster, stream)
        : launch_held<Source, 1, kVectors, kThreads, kCtas, false>(source, rows, cluster, stream);
  };
  if (width() <= kColumns * kNarrow && rows.m <= kMaxGridRows) {
    return go.template operator()<1, kNarrow, 2>();
  }
  if (regular && rows.m <= kFewRows && (!rows.gather || columns <= kLeftBytes)) {
    using Few = typename Source::Few;
    if constexpr (Few::kOne > 0) {
      if (width() <= kColumns * Few::kOne) {
        return launch_few<Source, 1, Few::kOne>(source, rows, cluster, stream);
      }
    }
    if constexpr (Few::kTwo > 0) {
      if (width() <= kColumns * 2 * Few::kTwo) {
        return launch_few<Source, 2, Few::kTwo>(source, rows, cluster, stream);
      }
    }
    if constexpr (Few::kFour > 0) {
      if (!rows.gather && width() <= kColumns * 4 * Few::kFour) {
        return launch_few<Source, 4, Few::kFour>(source, rows, cluster, stream);
      }
    }
  }
  if (width() <= kColumns * kMost) return go.template operator()<1, kMost, 1>();
  if (Source::kMaxVectors < 4 || width() <= 2 * kColumns * kMost) {
    return go.template operator()<2, kMost, 1>();
  }
  if constexpr (Source::kMaxVectors >= 4) go.template operator()<4, kWide, 1>();
}

}  // namespace
}  // namespace spense::cuda
