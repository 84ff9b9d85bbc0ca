// SPDX-License-Identifier: Apache-2.0
// Takes the place of csrc/device/ptx_rows.cuh.
#pragma once

#include "device/ptx.cuh"

namespace spense::ptx {

inline constexpr int kRankShift = 28;

inline uint32_t remote_address(uint32_t address, uint32_t rank) {
  return address | rank << kRankShift;
}
inline char* remote_pointer(uint32_t remote) {
  char* base = fibers::cta->cluster->thread_pointers[remote >> kRankShift];
  return base + (static_cast<int64_t>(remote & ((1u << kRankShift) - 1)) - kBias);
}
inline float load_remote(uint32_t remote) {
  return *reinterpret_cast<float*>(remote_pointer(remote));
}
inline void store_remote(uint32_t remote, uint32_t v) {
  *reinterpret_cast<uint32_t*>(remote_pointer(remote)) = v;
}
inline void store_remote(uint32_t remote, double v) {
  *reinterpret_cast<double*>(remote_pointer(remote)) = v;
}
inline void prefetch_l2(const void*) {}
inline float exp2_fast(float t) { return std::exp2(t); }

}  // namespace spense::ptx
