// SPDX-License-Identifier: Apache-2.0
// A control for racecheck: the ring of the SM90 kernel at its smallest. One thread fills slots by
// bulk copies, a warp reads them with ordinary loads, and barriers in shared memory order both: a
// copy is read after its barrier completed, and a slot is filled again after the warp has read it:
// one lane arrives behind a __syncwarp(). Nothing is wrong here, so what racecheck reports of it is
// the tool's.
#include <cuda_runtime.h>

#include <cstdint>

#include "../gemm/barrier.cuh"

namespace {

constexpr int kStages = 2, kLanes = 32, kWords = 128;  // words of a slot
constexpr uint32_t kBytes = kWords * 4;

}  // namespace

extern "C" __global__ void racecheck_control(const uint32_t* from, uint32_t* sums, int chunks) {
  __shared__ alignas(128) uint32_t ring[kStages][kWords];
  __shared__ uint64_t full[kStages], empty[kStages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full[i])));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&empty[i])));
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < chunks; ++i) {
      const int slot = i % kStages;
      const uint32_t barrier = shared_address(&full[slot]);
      if (i >= kStages) wait(shared_address(&empty[slot]), (i / kStages - 1) & 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"(kBytes)
                   : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
          "[%3];" ::"r"(shared_address(ring[slot])),
          "l"(from + int64_t{i} * kWords), "r"(kBytes), "r"(barrier)
          : "memory");
    }
  } else if (threadIdx.x >= kLanes) {
    const int lane = static_cast<int>(threadIdx.x) - kLanes;
    uint32_t sum = 0;
    for (int i = 0; i < chunks; ++i) {
      const int slot = i % kStages;
      wait(shared_address(&full[slot]), i / kStages & 1);
      for (int word = lane; word < kWords; word += kLanes) sum += ring[slot][word];
      __syncwarp();
      if (lane == 0) {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&empty[slot]))
                     : "memory");
      }
    }
    sums[lane] = sum;
  }
}

// from: `chunks` times 128 words; sums: 32 words. Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int racecheck_control_launch(void* stream,
                                                                               const uint32_t* from,
                                                                               uint32_t* sums,
                                                                               int chunks) {
  racecheck_control<<<1, 2 * kLanes, 0, static_cast<cudaStream_t>(stream)>>>(from, sums, chunks);
  return cudaGetLastError();
}
