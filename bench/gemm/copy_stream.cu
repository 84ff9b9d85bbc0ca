// SPDX-License-Identifier: Apache-2.0
// The ceiling of a weight-streaming GEMM: the same bytes in the same launch chain, no arithmetic.
// Bulk copies into a ring of shared memory read w and x; a bulk copy writes y. As in the GEMM, the
// ring fills with w before the wait for the kernel ahead, and everything else comes after it.
//   nvcc -shared: loaded with ctypes by copy_stream.py
#include <cuda_runtime.h>

#include <cstdint>

#include "barrier.cuh"

namespace {

constexpr int kThreads = 64;  // warp 0 loads, warp 1 frees

struct Job {
  const uint8_t *w, *x;
  uint8_t* y;
  int64_t w_bytes, x_bytes, y_bytes;  // multiples of 16
  int chunk, stages;
};

__device__ void load(uint32_t to, const uint8_t* from, uint32_t bytes, uint32_t barrier) {
  constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}

__global__ void __launch_bounds__(kThreads) copy_stream(const Job job) {
  extern __shared__ __align__(128) uint8_t smem[];
  const uint32_t ring = shared_address(smem);
  const uint32_t full = ring + static_cast<uint32_t>(job.stages * job.chunk);
  const uint32_t empty = full + static_cast<uint32_t>(job.stages) * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < job.stages; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + i * 8));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(empty + i * 8));
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;");

  const int64_t w_chunks = (job.w_bytes + job.chunk - 1) / job.chunk;
  const int64_t chunks = w_chunks + (job.x_bytes + job.chunk - 1) / job.chunk;
  const int64_t mine = chunks > blockIdx.x ? (chunks - blockIdx.x - 1) / gridDim.x + 1 : 0;
  if (threadIdx.x == 0) {
    bool waited = false;
    for (int64_t i = 0; i < mine; ++i) {
      const int64_t c = blockIdx.x + i * gridDim.x;
      const bool of_w = c < w_chunks;
      if (!waited && (i >= job.stages || !of_w)) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        waited = true;
      }
      const int stage = static_cast<int>(i % job.stages);
      if (i >= job.stages) {
        wait(empty + stage * 8, static_cast<uint32_t>(i / job.stages & 1) ^ 1);
      }
      const int64_t at = (of_w ? c : c - w_chunks) * job.chunk;
      const int64_t left = (of_w ? job.w_bytes : job.x_bytes) - at;
      load(ring + stage * job.chunk, (of_w ? job.w : job.x) + at,
           static_cast<uint32_t>(left < job.chunk ? left : job.chunk), full + stage * 8);
    }
    if (!waited) asm volatile("griddepcontrol.wait;" ::: "memory");
  } else if (threadIdx.x == 32) {
    for (int64_t i = 0; i < mine; ++i) {
      const int stage = static_cast<int>(i % job.stages);
      wait(full + stage * 8, static_cast<uint32_t>(i / job.stages & 1));
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + stage * 8) : "memory");
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int64_t share = (job.y_bytes / 16 + gridDim.x - 1) / gridDim.x * 16;
    const int64_t end = min(job.y_bytes, share * (blockIdx.x + 1));
    for (int64_t at = share * blockIdx.x; at < end; at += job.chunk) {
      const uint32_t bytes = static_cast<uint32_t>(min(end - at, static_cast<int64_t>(job.chunk)));
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(job.y + at),
                   "r"(ring), "r"(bytes)
                   : "memory");
    }
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

}  // namespace

// Launches on a stream of the current device; returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int copy_stream_launch(
    void* stream, int ctas, int chunk, int stages, const void* w, int64_t w_bytes, const void* x,
    int64_t x_bytes, void* y, int64_t y_bytes) {
  const Job job{static_cast<const uint8_t*>(w),
                static_cast<const uint8_t*>(x),
                static_cast<uint8_t*>(y),
                w_bytes,
                x_bytes,
                y_bytes,
                chunk,
                stages};
  const int smem = stages * (chunk + 16);
  const cudaError_t allowed =
      cudaFuncSetAttribute(copy_stream, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  if (allowed != cudaSuccess) return allowed;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(smem);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, copy_stream, job);
}
