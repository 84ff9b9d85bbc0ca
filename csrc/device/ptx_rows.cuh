// SPDX-License-Identifier: Apache-2.0
// PTX leaves of kernels that work on rows: shared memory of the other CTAs of a cluster,
// prefetches, powers of two.
#pragma once

#include <cstdint>

namespace spense::ptx {

// The place with the same offset in the CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
__device__ __forceinline__ float load_remote(uint32_t remote) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(remote) : "memory");
  return v;
}
__device__ __forceinline__ void store_remote(uint32_t remote, uint32_t v) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote), "r"(v) : "memory");
}
__device__ __forceinline__ void store_remote(uint32_t remote, double v) {
  asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(remote), "d"(v) : "memory");
}

// Brings the line into L2; harmless for any mapped address.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// 2^t, relative error below 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float t) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
  return e;
}

}  // namespace spense::ptx
