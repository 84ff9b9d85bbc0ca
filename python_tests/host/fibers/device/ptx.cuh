// SPDX-License-Identifier: Apache-2.0
// Those instructions of csrc/device/ptx.cuh that row kernels use. A shared-memory address is the
// distance from the thread pointer plus kBias; the upper bits of a remote one name the CTA.
#pragma once

#include "fibers.h"

namespace spense::ptx {

inline constexpr int64_t kBias = 1 << 26;

inline uint32_t smem_address(const void* pointer) {
  const auto* base = static_cast<const char*>(__builtin_thread_pointer());
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - base + kBias);
}
inline void pin(uint32_t&) {}
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

}  // namespace spense::ptx
