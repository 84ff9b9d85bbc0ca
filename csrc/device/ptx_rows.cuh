// SPDX-License-Identifier: Apache-2.0
// PTX leaves of kernels that work on rows: shared memory of the other CTAs of a cluster,
// copies to shared memory, maxima, powers of two.
#pragma once

#include <cstdint>

namespace spense::ptx {

// The place with the same offset in the CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
// Stores to shared memory of the cluster and counts the bytes at the barrier, which lies in the
// same CTA; whoever waits for it sees them.
__device__ __forceinline__ void store_async(uint32_t remote, uint32_t v, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(remote),
      "r"(v), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void store_async(uint32_t remote, double v, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(remote),
      "l"(__double_as_longlong(v)), "r"(barrier)
      : "memory");
}
// The same for a run of this CTA's shared memory, which the copy engine reads. Places and sizes are
// multiples of 16 bytes.
__device__ __forceinline__ void copy_to_cluster(uint32_t remote, uint32_t from, uint32_t bytes,
                                                uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
      " [%0], [%1], %2, [%3];" ::"r"(remote),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Arrival that orders no memory.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// 16 bytes that only this thread reads, once copy_async_wait has returned; it lets the last
// kPending commits go on.
__device__ __forceinline__ void copy_async(uint32_t smem, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The larger of peak and |v|; NaN if one is.
__device__ __forceinline__ float larger_magnitude(float peak, float v) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(peak), "f"(fabsf(v)));
  return result;
}

// 2^t, relative error below 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float t) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
  return e;
}

}  // namespace spense::ptx
