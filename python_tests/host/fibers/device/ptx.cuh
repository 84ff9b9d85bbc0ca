// SPDX-License-Identifier: Apache-2.0
// Those instructions of csrc/device/ptx.cuh that row kernels use. A shared-memory address is the
// distance from the thread pointer plus kBias; the upper bits of a remote one name the CTA.
#pragma once

#include <mutex>

#include "fibers.h"

namespace spense::ptx {

inline constexpr int64_t kBias = 1 << 26;

inline uint32_t smem_address(const void* pointer) {
  const auto* base = static_cast<const char*>(__builtin_thread_pointer());
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - base + kBias);
}
template <typename V>
inline void pin(V&) {}
inline void grid_dependency_wait() {}
inline void grid_launch_dependents() {}
inline uint32_t cluster_rank() { return fibers::cta->rank; }
inline void cluster_arrive() {
  ++fibers::fiber->arrivals;
  auto& cta = *fibers::cta;
  if (++cta.cluster_arrivals < static_cast<int>(cta.threads.x)) return;
  cta.cluster_arrivals = 0;
  if (++cta.cluster->arrived == cta.cluster->ctas) {
    cta.cluster->arrived = 0;
    ++cta.cluster->generation;
  }
}
inline void cluster_wait() {
  while (fibers::cta->cluster->generation < fibers::fiber->arrivals) fibers::yield();
}

// An mbarrier in its 8 bytes. Threads of several CTAs change it.
struct Mbarrier {
  uint8_t arrivals, pending, phase;
  int32_t bytes;
};
static_assert(sizeof(Mbarrier) == 8);
inline std::mutex mbarriers;

inline Mbarrier& mbarrier_at(uint32_t address) {
  char* base = static_cast<char*>(__builtin_thread_pointer());
  return *reinterpret_cast<Mbarrier*>(base + (static_cast<int64_t>(address) - kBias));
}
inline void change(Mbarrier& barrier, int arrivals, int bytes) {
  const std::lock_guard lock(mbarriers);
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.arrivals;
    barrier.phase ^= 1;
  }
}
inline void barrier_init(uint32_t address, uint32_t arrivals) {
  const auto count = static_cast<uint8_t>(arrivals);
  mbarrier_at(address) = {count, count, 0, 0};
}
inline void barrier_init_fence() {}
inline void async_proxy_fence() {}
inline void barrier_arrive_expect(uint32_t address, uint32_t bytes) {
  change(mbarrier_at(address), 1, static_cast<int>(bytes));
}
inline void barrier_wait(uint32_t address, uint32_t parity) {
  const auto passed = [&] {
    const std::lock_guard lock(mbarriers);
    return mbarrier_at(address).phase != parity;
  };
  while (!passed()) fibers::yield();
}

}  // namespace spense::ptx
