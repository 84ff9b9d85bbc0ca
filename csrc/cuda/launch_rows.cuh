// SPDX-License-Identifier: Apache-2.0
// Which instance of quantize_held_rows runs, and its grid.
#pragma once

#include "cuda/held_rows.cuh"
#include "device/launch.h"

namespace spense::cuda {
namespace {

constexpr int kSliceStep = 128;  // slices are multiples of this many columns
constexpr int64_t kNearColumns = 1 << 16;
constexpr int64_t kFewRows = 64;  // tokens of the GEMM's tiles that leave half a multiprocessor

template <typename Source, int kRows, int kVectors, int kThreads, int kCtas, bool kRegular>
void launch_held(const Source& source, const QuantizeArgs& rows, int cluster, Stream stream) {
  constexpr int64_t kLeastOutputs = 1024;
  const int64_t steps = rows.y_stride / kSliceStep;
  Slices slices;
  slices.cluster = cluster;
  slices.width = static_cast<int>((steps + cluster - 1) / cluster * kSliceStep);
  slices.outputs = slices.width;
  const int64_t multiprocessors = device_info().multiprocessors;
  int64_t ctas = cluster;  // of a row
  constexpr bool kShares = kRows * kVectors == 1;
  if (kShares && cluster == 1 && rows.gather) {
    // Random reads of shared memory take their time, but so does reading a row several times.
    constexpr int64_t kIdle = 8;  // multiprocessors without work for each CTA
    ctas = std::clamp<int64_t>(multiprocessors / (kIdle * rows.m), 1,
                               slices.width / kLeastOutputs + 1);
    slices.outputs = static_cast<int>((steps + ctas - 1) / ctas * kSliceStep);
  }
  LaunchShape shape;
  const int64_t vectors = slices.width / kColumns;
  shape.block = dim3(static_cast<unsigned>(((vectors + kVectors - 1) / kVectors + 31) / 32 * 32));
  shape.cluster = cluster;
  shape.dependent = true;
  int64_t smem = rows.gather ? kRows * rows.y_stride : 0;
  int64_t groups = std::min<int64_t>((rows.m + kRows - 1) / kRows, kMaxGridRows);
  if constexpr (kThroughMemory<kRows, kVectors, kCtas, kRegular>) {
    constexpr int64_t kBytes = kStageBytes<Source, kRows, kVectors, kThreads>;
    static_assert(kBytes + kNearColumns <= kMaxSmem);
    if (cluster == 1) groups = std::min(groups, multiprocessors * kCtas);
    const bool stays = groups * kRows < rows.m;
    slices.stage = static_cast<int>(smem);
    slices.ahead = stays && smem + 2 * kBytes <= kMaxSmem / kCtas ? kAhead<kRows, kVectors> : 1;
    smem += slices.ahead * kBytes;
  }
  shape.grid = dim3(static_cast<unsigned>(ctas), static_cast<unsigned>(groups));
  shape.smem_bytes = static_cast<int>(smem);
  auto* kernel = &quantize_held_rows<Source, kRows, kVectors, kThreads, kCtas, kRegular>;
  if (smem > 40 * 1024) allow_smem(kernel, kMaxSmem);  // 48 KiB are free, with the static part
  launch(kernel, shape, stream, source, rows, slices);
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
  if constexpr (Source::kMaxVectors >= 2) {
    constexpr int kTwo = 512;   // threads of which two CTAs have registers for two vectors,
    constexpr int kFour = 448;  // and for four
    const bool beside = regular && rows.m <= kFewRows;
    if (beside && width() <= kColumns * 2 * kTwo) {
      return launch_held<Source, 1, 2, kTwo, 2, true>(source, rows, cluster, stream);
    }
    if constexpr (Source::kMaxVectors >= 4) {
      if (beside && width() <= kColumns * 4 * kFour) {
        return launch_held<Source, 1, 4, kFour, 2, true>(source, rows, cluster, stream);
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
