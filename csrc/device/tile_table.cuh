// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace spense::device {

// Reads a table, or the beginning of a long one, into the multiprocessor's cache: later reads would
// wait for one another. For a warp; returns what must be looked at for the reads to happen, which
// is not negative.
__device__ __forceinline__ int32_t touch(const int4* tiles, int32_t row_tiles) {
  constexpr int32_t kLine = 128 / sizeof(int4);
  const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
  const int32_t near = min(lane * kLine, row_tiles), far = min((lane + 32) * kLine, row_tiles);
  return __ldg(&tiles[near].x) | __ldg(&tiles[far].x);
}

// The tile table on the device; a warp searches it together.
struct DeviceTable {
  const int4* tiles;
  int32_t row_tiles, stream_blocks, group_tiles;

  __device__ int32_t blocks_before(int32_t tile) const { return __ldg(&tiles[tile].x); }
  __device__ int32_t sparse_units(int32_t tile) const { return __ldg(&tiles[tile].y); }

  // The last group g with width * blocks_before(group_tiles * g) <= target. First looks around the
  // place that equal tiles would give, then cuts the range into 32 parts until one group is left.
  __device__ int32_t find(int32_t groups, int32_t width, int64_t target) const {
    const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
    const auto within = [&](int32_t group) {
      return group < groups &&
             static_cast<int64_t>(width) * blocks_before(group * group_tiles) <= target;
    };
    const int32_t guess = static_cast<int32_t>(
        static_cast<float>(target) / (static_cast<float>(width) * stream_blocks) * groups);
    int32_t low = max(0, min(guess - 15, groups - 1));
    uint32_t hits = __ballot_sync(~0u, within(low + lane));
    if (hits != 0 && (hits != ~0u || low + 32 >= groups)) return low + __popc(hits) - 1;
    low = 0;
    int32_t high = groups;
    while (high - low > 1) {
      const int32_t stride = (high - low + 31) / 32;
      hits = __ballot_sync(~0u, low + lane * stride < high && within(low + lane * stride));
      low += (__popc(hits) - 1) * stride;
      high = min(high, low + stride);
    }
    return low;
  }
};

}  // namespace spense::device
