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
template <typename V>
void store_async(uint32_t remote, V v, uint32_t barrier) {
  std::memcpy(remote_pointer(remote), &v, sizeof v);
  change(*reinterpret_cast<Mbarrier*>(remote_pointer(barrier)), 0, -static_cast<int>(sizeof v));
}
inline void copy_to_cluster(uint32_t remote, uint32_t from, uint32_t bytes, uint32_t barrier) {
  std::memcpy(remote_pointer(remote), &mbarrier_at(from), bytes);
  change(*reinterpret_cast<Mbarrier*>(remote_pointer(barrier)), 0, -static_cast<int>(bytes));
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void copy_async(uint32_t smem, const void* global) {
  char* base = static_cast<char*>(__builtin_thread_pointer());
  std::memcpy(base + (static_cast<int64_t>(smem) - kBias), global, 16);
}
inline void copy_async_commit() {}
template <int>
inline void copy_async_wait() {}
inline float larger_magnitude(float peak, float v) {
  v = std::fabs(v);
  return std::isnan(peak) || v <= peak ? peak : v;
}
inline float exp2_fast(float t) { return std::exp2(t); }

}  // namespace spense::ptx
