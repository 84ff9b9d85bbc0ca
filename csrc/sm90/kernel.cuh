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
#include "sm90/pieces.cuh"

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
  if constexpr (T::kClusterSize > 1) {
    for (int i = 0; i < T::kTicketStages; ++i) {
      ptx::barrier_init(smem + T::kTicketFull + 8 * i, heuristics::ticket_full_arrivals());
      ptx::barrier_init(smem + T::kTicketEmpty + 8 * i,
                        heuristics::ticket_empty_arrivals(T::kConfig));
    }
  }
  if constexpr (T::kSplits > 1) {
    for (int i = 0; i < heuristics::kConsumerWarpgroups * heuristics::kMaxSplits; ++i) {
      ptx::barrier_init(smem + T::kExchanged + 8 * i, 1);
    }
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

// Gives out the whole tiles behind the first of each cluster, whose first CTA takes a ticket and
// tells the others. The counter is back to 0 when every cluster has been told that there are no
// more; the kernel ahead may use it till its end. For one warp of each CTA.
template <class T>
class Tickets {
 public:
  __device__ Tickets(const Params& p, uint32_t smem) : p_(p), smem_(smem) {}

  __device__ int take() {
    uint32_t ticket = 0;
    if (T::kClusterSize == 1 || ptx::cluster_rank() == 0) {
      if (!waited_) ptx::grid_dependency_wait();
      waited_ = true;
      const heuristics::ScheduleParams& s = p_.schedule;
      uint32_t* counter = p_.counters + s.clusters * T::kClusterSize * heuristics::kConsumerWarpgroups;
      if (ptx::lane_id() == 0) ticket = ptx::atomic_ticket(counter, s.whole - 1);
      ticket = __shfl_sync(~0u, ticket, 0);
      if constexpr (T::kClusterSize > 1) tell(ticket);
    } else {
      ticket = hear();
    }
    return p_.schedule.clusters + static_cast<int>(ticket);
  }

 private:
  __device__ void tell(uint32_t ticket) {
    ptx::barrier_wait(smem_ + T::kTicketEmpty + 8 * at_.slot, at_.parity ^ 1);
    __syncwarp();
    const uint32_t rank = ptx::lane_id();
    if (rank > 0 && rank < T::kClusterSize) {
      ptx::store_remote(word(), ticket, smem_ + T::kTicketFull + 8 * at_.slot, rank);
    }
    at_.advance();
  }
  __device__ uint32_t hear() {
    const uint32_t full = smem_ + T::kTicketFull + 8 * at_.slot;
    if (ptx::lane_id() == 0) ptx::barrier_arrive_expect(full, 4);
    ptx::barrier_wait_cluster(full, at_.parity);
    const uint32_t ticket = ptx::load_shared(word());
    __syncwarp();
    if (ptx::lane_id() == 0) {
      ptx::barrier_arrive_remote(smem_ + T::kTicketEmpty + 8 * at_.slot, 0);
    }
    at_.advance();
    return ticket;
  }
  __device__ uint32_t word() const { return smem_ + T::kTicketWords + 4 * at_.slot; }

  const Params& p_;
  uint32_t smem_;
  Cursor<T::kTicketStages> at_;
  bool waited_ = false;
};

template <class T>
__device__ __forceinline__ void load_weights(const Params& p, uint32_t smem, JobRing<T>& jobs,
                                             int cluster, int row, int split) {
  constexpr int kGroup = heuristics::group_tiles(T::kConfig);
  const device::DeviceTable table{p.tiles, p.schedule.row_tiles, p.schedule.stream_blocks, kGroup};
  heuristics::Schedule<device::DeviceTable, kGroup> schedule(p.schedule, table, cluster, split,
                                                             T::kSplits);
  heuristics::Segment segment;
  WeightLoader<T> loader(p, smem);
  const bool by_tickets = heuristics::by_tickets(p.schedule);
  Tickets<T> tickets(p, smem);
  const auto following = [&] { return by_tickets ? tickets.take() : schedule.following(); };
  while (schedule.next(segment, following)) {
    loader.load(segment.group * kGroup + row * T::kRowTiles, segment, jobs);
  }
  loader.finish();
  jobs.put(Job{-1});
}

template <class T>
__device__ __forceinline__ void load_activations(const Params& p, uint32_t smem, JobRing<T>& jobs,
                                                 int row, int split) {
  ptx::grid_dependency_wait();
  ActivationLoader<T> loader(p, smem, row, split * T::kClusterRows);
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
                                        int cluster, int row, int split) {
  ptx::grid_dependency_wait();  // before anything is read that the kernel ahead wrote
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4;
  Multiplier<T> multiplier(smem, warpgroup, split * T::kClusterRows);
  const Combiner<T> combiner(p, smem, cluster, row, warpgroup);
  const Exchange<T> exchange(p, smem, cluster, row, split, warpgroup);
  const Pieces<T> pieces(p, smem, cluster, row, warpgroup);
  const auto staging = [&] {
    return (T::kStagedInSlot ? multiplier.lent_slot() : smem + T::kStaging) +
           warpgroup * T::kStagingBytes;
  };
  float sums[T::kParts][T::kSums];
  uint32_t left_to_me = 0;  // shares of the tile cut into pieces
  while (true) {
    jobs.wait();
    const Job work = jobs.read();
    if (work.row_tile < 0) break;
    const int token0 = work.token_tile * p.tile_tokens;
    const int token_end = min(token0 + p.tile_tokens, p.m);
    const int row0 = T::kRowTiles == 2
                         ? (work.row_tile + warpgroup) * kTileRows + warp % 4 * 16
                         : work.row_tile * kTileRows + warpgroup * T::kPartRows + warp % 4 * 16;
    if (T::kTails && work.begin == work.end) {
      done(jobs);
      pieces.finish(work, left_to_me | pieces.ask(work), [&](int group, int part, auto& finished) {
        Writer<Share<T>> writer;
        writer.start(p, warpgroup, token0 + group * Share<T>::kOwnTokens, token_end,
                     row0 + part * T::kPartRows);
        writer.store(finished, staging(), false);
      });
      continue;
    }
    Writer<T> writer[T::kParts];
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      writer[part].start(p, warpgroup, token0 + split * T::kOwnTokens, token_end,
                         row0 + part * T::kPartRows);
    }
    const int sparse_units =
        T::kRowTiles == 2 && warpgroup == 1 ? work.sparse_units[1] : work.sparse_units[0];
    multiplier.run(sums, walk_of(p.schedule), work.begin, work.end, sparse_units,
                   p.schedule.k_blocks);
    const Job job = jobs.read();  // again, so that it takes no registers meanwhile
    done(jobs);
    const auto store = [&](auto& finished) {
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) {
        writer[part].store(finished[part], staging(), T::kStagedInSlot && part == 0);
      }
    };
    if constexpr (T::kSplits > 1) {
      float own[T::kParts][T::kOwnSums];
      exchange.run(sums, own);
      store(own);
    } else if (T::kTails && p.schedule.pieces > 0 && job.first != job.last) {
      left_to_me = pieces.arrive(job, sums);
    } else if (job.first == job.last || combiner.combine(job, sums)) {
      store(sums);
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
  const int cluster = blockIdx.x / T::kClusterSize, row = blockIdx.x % T::kClusterRows;
  const int split = blockIdx.x % T::kClusterSize / T::kClusterRows;

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
    consume<T>(p, smem, jobs, cluster, row, split);
  } else {
    ptx::give_registers<T::kLoaderRegisters>();
    if (role == WarpRole::kWeights) load_weights<T>(p, smem, jobs, cluster, row, split);
    if (role == WarpRole::kActivations) load_activations<T>(p, smem, jobs, row, split);
  }
  // Nobody leaves while a neighbour may still arrive at its barriers.
  if constexpr (T::kClusterSize > 1) {
    __syncwarp();
    sync_cluster<T>();
  }
}

}  // namespace spense::sm90
