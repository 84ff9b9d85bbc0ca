// SPDX-License-Identifier: Apache-2.0
// L2 policies as bulk copies take them.
#pragma once

#include <cstdint>

namespace spense::device {

inline constexpr uint64_t kEvictFirst = 0x12F0000000000000;
inline constexpr uint64_t kEvictNormal = 0x1000000000000000;
inline constexpr uint64_t kEvictLast = 0x14F0000000000000;

// Weights that are read once need not stay.
constexpr uint64_t weight_policy(int64_t reads) { return reads == 1 ? kEvictFirst : kEvictNormal; }

}  // namespace spense::device
