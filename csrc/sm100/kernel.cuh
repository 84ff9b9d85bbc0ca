// SPDX-License-Identifier: Apache-2.0
// The hybrid GEMM of SM100.
//
//   y[m, n] = (sum_k x[m, k] * w[n, k]) * x_scale[m] * w_scale[n] + bias[n]
//
// x is e4m3 in gather order, w a tile stream: tcgen05.mma.sp over a tile's sparse units, then
// tcgen05.mma over its dense ones, into the same sums in tensor memory. Weight rows are the M of
// the instruction, tokens its N. With kCtas 2 a pair of CTAs shares every instruction, each with a
// row tile and half of the tokens of x; with kPairs 2 two pairs fetch x together.
//
// Persistent CTAs, one a multiprocessor; with residency 2 the next kernel's fit beside them:
//   warps 0-3   epilogue: combine, scale and store one tile while the next is multiplied
//   warp 4      weights: walks the heuristics::Schedule, tells the others (JobRing), and copies
//               units, which starts before the kernel ahead has finished
//   warp 5      activations: tensor copies
//   warp 6      MMA, in the leader of a pair alone; it also allocates the tensor memory
#pragma once

#include "device/persistent.h"
#include "device/tile_table.cuh"
#include "sm100/epilogue.cuh"
#include "sm100/loaders.cuh"
#include "sm100/mainloop.cuh"

namespace spense::sm100 {

template <class T>
__device__ void init_barriers(uint32_t smem) {
  namespace h = heuristics::sm100;
  for (int i = 0; i < T::kWStages; ++i) {
    ptx::barrier_init(smem + T::kWFull + 8 * i, h::w_full_arrivals());
    ptx::barrier_init(smem + T::kWEmpty + 8 * i, h::w_empty_arrivals());
  }
  for (int i = 0; i < T::kXStages; ++i) {
    ptx::barrier_init(smem + T::kXFull + 8 * i, h::x_full_arrivals());
    ptx::barrier_init(smem + T::kXEmpty + 8 * i, h::x_empty_arrivals(T::kConfig));
  }
  for (int i = 0; i < T::kAccumulators; ++i) {
    ptx::barrier_init(smem + T::kSumsFull + 8 * i, h::sums_full_arrivals());
    ptx::barrier_init(smem + T::kSumsEmpty + 8 * i, h::sums_empty_arrivals(T::kConfig));
  }
  for (int i = 0; i < T::kJobStages; ++i) {
    ptx::barrier_init(smem + T::kJobFull + 8 * i, h::job_full_arrivals());
    ptx::barrier_init(smem + T::kJobEmpty + 8 * i, h::job_empty_arrivals());
  }
  ptx::barrier_init(smem + T::kDrained, h::drained_arrivals());
  ptx::barrier_init_fence();
}

template <class T>
__device__ __forceinline__ void sync_cluster() {
  if constexpr (T::kClusterSize > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
}

template <class T>
__device__ __forceinline__ void load_weights(const Params& p, uint32_t smem, JobRing<T>& jobs,
                                             int cluster, int rank) {
  const device::DeviceTable table{p.tiles, p.schedule.row_tiles, p.schedule.stream_blocks,
                                  T::kClusterSize};
  heuristics::Schedule<device::DeviceTable, T::kClusterSize> schedule(p.schedule, table, cluster);
  heuristics::Segment segment;
  WeightLoader<T> loader(p, smem, rank);
  while (schedule.next(segment)) loader.load(segment.group * T::kClusterSize, segment, jobs);
  jobs.put(Job{-1, 0, 0, 0, 0, 0, {}, {}});
  loader.finish();
}

// One thread.
template <class T>
__device__ __forceinline__ void load_activations(const Params& p, uint32_t smem, JobRing<T>& jobs,
                                                 int rank) {
  ptx::grid_dependency_wait();
  ActivationLoader<T> loader(p, smem, rank);
  while (true) {
    jobs.wait();
    const Job job = jobs.read();
    jobs.done(true);
    if (job.row_tile < 0) break;
    loader.load(job);
  }
  loader.finish();
}

// One thread.
template <class T>
__device__ __forceinline__ void multiply(const Params& p, uint32_t smem, uint32_t tmem,
                                         JobRing<T>& jobs, int rank) {
  Multiplier<T> multiplier(smem, tmem, rank);
  while (true) {
    jobs.wait();
    const Job job = jobs.read();
    jobs.done(true);
    if (job.row_tile < 0) break;
    if (rank % T::kCtas == 0) multiplier.run(job, p.schedule.k_blocks);
  }
}

template <class T>
__device__ __forceinline__ void finish_tiles(const Params& p, uint32_t smem, uint32_t tmem,
                                             JobRing<T>& jobs, int cluster, int rank, int warp) {
  ptx::grid_dependency_wait();  // before anything is read that the kernel ahead wrote
  Epilogue<T> epilogue(p, smem, tmem, cluster, rank, warp);
  while (true) {
    jobs.wait();
    const Job job = jobs.read();
    __syncwarp();
    jobs.done(ptx::lane_id() == 0);
    if (job.row_tile < 0) break;
    epilogue.run(job);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kResidency)
    hybrid_gemm(const __grid_constant__ Params p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
  const uint32_t smem = ptx::dynamic_smem();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const WarpRole role = warp < 4    ? WarpRole::kEpilogue
                        : warp == 4 ? WarpRole::kWeights
                        : warp == 5 ? WarpRole::kActivations
                                    : WarpRole::kMma;
  const int cluster = blockIdx.x / T::kClusterSize, rank = blockIdx.x % T::kClusterSize;
  const bool first_lane = ptx::lane_id() == 0;

  ptx::grid_launch_dependents();
  if (role == WarpRole::kWeights && first_lane) {
    if (smem % 1024 != 0) __trap();
    init_barriers<T>(smem);
  }
  if (role == WarpRole::kActivations && first_lane) {
    ptx::prefetch_tensor_map(&p.x_map);
    if (T::kCtas > 1) {
      ptx::prefetch_tensor_map(&p.sparse_map);
      ptx::prefetch_tensor_map(&p.dense_map);
    }
  }
  if (role == WarpRole::kMma) {
    ptx::tmem_allocate<T::kCtas>(smem + T::kTmem, T::kTmemColumns);
    ptx::tmem_end_allocating<T::kCtas>();
  }
  __syncwarp();
  ptx::tmem_fence_before();
  sync_cluster<T>();
  ptx::tmem_fence_after();
  const uint32_t tmem = ptx::load_shared(smem + T::kTmem);

  JobRing<T> jobs(smem);
  switch (role) {
    case WarpRole::kEpilogue:
      finish_tiles<T>(p, smem, tmem, jobs, cluster, rank, warp);
      break;
    case WarpRole::kWeights:
      load_weights<T>(p, smem, jobs, cluster, rank);
      break;
    case WarpRole::kActivations:
      if (first_lane) load_activations<T>(p, smem, jobs, rank);
      break;
    case WarpRole::kMma:
      if (first_lane) multiply<T>(p, smem, tmem, jobs, rank);
      break;
  }

  // Nobody leaves while a neighbour may still arrive at its barriers, and the tensor memory is
  // given back when nobody reads it any more.
  __syncwarp();
  ptx::tmem_fence_before();
  sync_cluster<T>();
  ptx::tmem_fence_after();
  if (role == WarpRole::kMma) ptx::tmem_free<T::kCtas>(tmem, T::kTmemColumns);
#endif  // elsewhere it is empty, and plan_gemm has no plan
}

}  // namespace spense::sm100
