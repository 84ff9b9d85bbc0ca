// SPDX-License-Identifier: Apache-2.0
// What a GEMM of few tokens leaves of a multiprocessor to the small kernels around it.
#pragma once

namespace spense::device {

inline constexpr int kRegisters = 65536;     // of a multiprocessor, a quarter each for its warps
inline constexpr int kSharingThreads = 384;  // of such a GEMM's CTA
// Of each of them, so that two CTAs would fit.
inline constexpr int kSharingRegisters = kRegisters / 2 / kSharingThreads / 8 * 8;

}  // namespace spense::device
