// SPDX-License-Identifier: Apache-2.0
// The hybrid GEMM of SM90.
//
//   y[m, n] = (sum_k x[m, k] * w[n, k]) * x_scale[m] * w_scale[n] + bias[n]
//
// x is e4m3 in gather order, w a tile stream: wgmma.sp over a tile's sparse units, then wgmma over
// its dense ones, into the same sums. Weight rows are the M of the instruction, tokens its N.
//
// Persistent CTAs, one a multiprocessor:
//   warps 0-3, 4-7   consumers, 64 rows of the CTA's tile or a tile each: multiply, combine, store
//   warp 8           weights: walks the heuristics::Schedule, tells the others (JobRing), and
//                    copies units, which starts before the kernel ahead has finished
//   warp 9           activations: tensor copies, shared by the CTAs of the cluster
#pragma once

#include "device/persistent.h"
#include "device/tile_table.cuh"
#include "sm90/epilogue.cuh"
#include "sm90/loaders.cuh"
#include "sm90/mainloop.cuh"
#include "sm90/reduce.cuh"

namespace spense::sm90 {

template <class T>
__device__ void init_barriers(uint32_t smem) {
  for (int i = 0; i < T::kWSlots; ++i) {
    ptx::barrier_init(smem + T::kWFull + 8 * i, heuristics::w_full_arrivals());
    ptx::barrier_init(smem + T::kWEmpty + 8 * i, heuristics::w_empty_arrivals(T::kConfig));
  }
  for (int i = 0; i < T::kXStages; ++i) {
    ptx::barrier_init(smem + T::kXFull + 8 * i, heuristics::x_full_arrivals());
    ptx::barrier_init(smem + T::kXEmpty + 8 * i, heuristics::x_empty_arrivals(T::kConfig));
  }
  for (int i = 0; i < T::kJobStages; ++i) {
    ptx::barrier_init(smem + T::kJobFull + 8 * i, heuristics::job_full_arrivals());
    ptx::barrier_init(smem + T::kJobEmpty + 8 * i, heuristics::job_empty_arrivals());
  }
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

// After every lane of the warp has read the job.
template <class T>
__device__ __forceinline__ void done(JobRing<T>& jobs) {
  __syncwarp();
  jobs.done(ptx::lane_id() == 0);
}

// Gives out the whole tiles behind the first of each CTA. The counter is back to 0 when every CTA
// has been told that there are no more; the kernel ahead may use it till its end. Not for clusters
// of several CTAs.
class Tickets {
 public:
  __device__ explicit Tickets(const Params& p) : p_(p) {}

  __device__ int take() {
    if (!waited_) ptx::grid_dependency_wait();
    waited_ = true;
    const heuristics::ScheduleParams& s = p_.schedule;
    uint32_t* counter = p_.counters + s.clusters * heuristics::kConsumerWarpgroups;
    uint32_t ticket = 0;
    if (ptx::lane_id() == 0) ticket = ptx::atomic_ticket(counter, s.whole - 1);
    return s.clusters + static_cast<int>(__shfl_sync(~0u, ticket, 0));
  }

 private:
  const Params& p_;
  bool waited_ = false;
};

template <class T>
__device__ __forceinline__ void load_weights(const Params& p, uint32_t smem, JobRing<T>& jobs,
                                             int cluster, int row) {
  constexpr int kGroup = heuristics::group_tiles(T::kConfig);
  const device::DeviceTable table{p.tiles, p.schedule.row_tiles, p.schedule.stream_blocks, kGroup};
  heuristics::Schedule<device::DeviceTable, kGroup> schedule(p.schedule, table, cluster);
  heuristics::Segment segment;
  WeightLoader<T> loader(p, smem);
  const bool by_tickets = heuristics::by_tickets(p.schedule, T::kClusterSize);
  Tickets tickets(p);
  const auto following = [&] { return by_tickets ? tickets.take() : schedule.following(); };
  while (schedule.next(segment, following)) {
    loader.load(segment.group * kGroup + row * T::kRowTiles, segment, jobs);
  }
  jobs.put(Job{-1});
}

template <class T>
__device__ __forceinline__ void load_activations(const Params& p, uint32_t smem, JobRing<T>& jobs,
                                                 int row) {
  ptx::grid_dependency_wait();
  ActivationLoader<T> loader(p, smem, row);
  while (true) {
    jobs.wait();
    const Job job = jobs.read();
    done(jobs);
    if (job.row_tile < 0) break;
    loader.load(job);
  }
}

template <class T>
__device__ __forceinline__ void consume(const Params& p, uint32_t smem, JobRing<T>& jobs,
                                        int cluster, int row) {
  ptx::grid_dependency_wait();  // before anything is read that the kernel ahead wrote
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4;
  Multiplier<T> multiplier(smem, warpgroup);
  const Combiner<T> combiner(p, smem, cluster, row, warpgroup);
  float sums[T::kParts][T::kSums];
  while (true) {
    jobs.wait();
    const Job work = jobs.read();
    if (work.row_tile < 0) break;
    const int token0 = work.token_tile * p.tile_tokens;
    const int token_end = min(token0 + p.tile_tokens, p.m);
    const int row0 = T::kRowTiles == 2
                         ? (work.row_tile + warpgroup) * kTileRows + warp % 4 * 16
                         : work.row_tile * kTileRows + warpgroup * T::kPartRows + warp % 4 * 16;
    Writer<T> writer[T::kParts];
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      writer[part].start(p, warpgroup, token0, token_end, row0 + part * T::kPartRows);
    }
    const int sparse_units =
        T::kRowTiles == 2 && warpgroup == 1 ? work.sparse_units[1] : work.sparse_units[0];
    multiplier.run(sums, walk_of(p.schedule), work.begin, work.end, sparse_units,
                   p.schedule.k_blocks);
    const Job job = jobs.read();  // again, so that it takes no registers meanwhile
    done(jobs);
    const uint32_t staging = (T::kStagedInSlot ? multiplier.lent_slot() : smem + T::kStaging) +
                             warpgroup * T::kStagingBytes;
    if (job.first == job.last || combiner.combine(job, sums)) {
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) {
        writer[part].store(sums[part], staging, T::kStagedInSlot && part == 0);
      }
    }
  }
  if constexpr (T::kStaged) {
    if (threadIdx.x % 128 == 0) ptx::store_wait_read<0>();
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kShares ? 2 : 1)
    hybrid_gemm(const __grid_constant__ Params p) {
  // Known to be the same in all lanes, and not computed anew wherever it is used.
  const uint32_t smem = __shfl_sync(~0u, ptx::dynamic_smem(), 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const WarpRole role = warp < 8    ? WarpRole::kConsumer
                        : warp == 8 ? WarpRole::kWeights
                        : warp == 9 ? WarpRole::kActivations
                                    : WarpRole::kIdle;
  const int cluster = blockIdx.x / T::kClusterSize, row = blockIdx.x % T::kClusterSize;

  ptx::grid_launch_dependents();
  int32_t touched = 0;
  if (role == WarpRole::kWeights) touched = device::touch(p.tiles, p.schedule.row_tiles);
  if (role == WarpRole::kWeights && ptx::lane_id() == 0) {
    if (smem % 1024 != 0) __trap();
    init_barriers<T>(smem);
  }
  if (role == WarpRole::kActivations && ptx::lane_id() == 0) ptx::prefetch_tensor_map(&p.x_map);
  sync_cluster<T>();
  if (touched < 0) __trap();

  JobRing<T> jobs(smem);
  if (role == WarpRole::kConsumer) {
    ptx::take_registers<T::kConsumerRegisters>();
    consume<T>(p, smem, jobs, cluster, row);
  } else {
    ptx::give_registers<T::kLoaderRegisters>();
    if (role == WarpRole::kWeights) load_weights<T>(p, smem, jobs, cluster, row);
    if (role == WarpRole::kActivations) load_activations<T>(p, smem, jobs, row);
  }
  // Nobody leaves while a neighbour may still arrive at its barriers.
  if constexpr (T::kClusterSize > 1) {
    __syncwarp();
    sync_cluster<T>();
  }
}

}  // namespace spense::sm90
