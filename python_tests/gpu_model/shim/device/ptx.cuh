// SPDX-License-Identifier: Apache-2.0
// Takes the place of csrc/device/ptx.cuh: the same leaves on model::machine().
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "wgmma.h"

namespace spense::ptx {

using model::machine;

inline bool elect_one() { return machine().self().lane() == 0; }
inline uint32_t lane_id() { return static_cast<uint32_t>(machine().self().lane()); }
template <int kCount>
void take_registers() {}
template <int kCount>
void give_registers() {}
inline uint32_t dynamic_smem() {
  return static_cast<uint32_t>(machine().self().cta->rank) << 24 | model::kSmemBase;
}

// --- dependent launch ---
inline void grid_dependency_wait() { machine().self().after_grid_wait = true; }
inline void grid_launch_dependents() {}

// --- mbarrier ---
void barrier_init(uint32_t barrier, uint32_t arrivals);
inline void barrier_init_fence() {}
void barrier_arrive(uint32_t barrier);
void barrier_arrive_expect(uint32_t barrier, uint32_t bytes);
void barrier_arrive_remote(uint32_t barrier, uint32_t rank);
void barrier_wait(uint32_t barrier, uint32_t parity);
inline void named_barrier_sync(uint32_t id, uint32_t threads) {
  model::sync_threads(static_cast<int>(id), static_cast<int>(threads));
}

// --- cluster ---
inline uint32_t cluster_rank() { return static_cast<uint32_t>(machine().self().cta->rank); }
void cluster_arrive();
void cluster_wait();

// --- copies ---
void bulk_copy(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier, uint64_t);
inline void bulk_prefetch_l2(const void* global, uint32_t bytes) {
  machine().global(global, bytes, false);
}
void tensor_copy_2d(uint32_t smem, const void* map, int column, int row, uint32_t barrier,
                    uint64_t);
void tensor_copy_2d_multicast(uint32_t smem, const void* map, int column, int row, uint32_t barrier,
                              uint16_t mask, uint64_t);
inline void prefetch_tensor_map(const void*) {}
void tensor_store_2d(const void* map, int column, int row, uint32_t smem);
void store_commit();
void store_wait(int pending);
template <int kPending>
void store_wait_read() {
  store_wait(kPending);
}
inline void store_wait_all() { store_wait(0); }
inline void async_proxy_fence() {}

// --- wgmma ---
inline void mma_fence() {}
inline void mma_commit() { model::wgmma_commit(); }
template <int kPending>
void mma_wait() {
  model::wgmma_wait(kPending);
}
template <typename T>
void pin(T&&) {}

// --- data movement ---
uint4 load_shared_v4(uint32_t address);
uint32_t load_shared(uint32_t address);
void store_shared(uint32_t address, uint32_t v);
void store_shared_v4(uint32_t address, uint4 v);
void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d);
void store_matrices(uint32_t to, uint32_t a, uint32_t b);
uint32_t atomic_ticket(uint32_t* counter, uint32_t last);
uint32_t load_relaxed(const uint32_t* from);
void store_relaxed(uint32_t* to, uint32_t v);
inline void fence_gpu() {}
uint32_t transpose_8x8(uint32_t fragment);

}  // namespace spense::ptx
