// SPDX-License-Identifier: Apache-2.0
// Sums of a tile that several CTAs hold parts of, put together in the order of K.
//
// Fragment: thread t of a warpgroup holds rows 16 * (t / 32) + t % 32 / 4 (+ 8) of its 64 and
// tokens 8 * j + t % 4 * 2 (+ 1): sums[4 j + 2 * (row + 8 ?) + (token + 1 ?)].
#pragma once

#include "device/ptx.cuh"
#include "sm90/mma.cuh"
#include "sm90/traits.cuh"

namespace spense::sm90 {

// Puts the segments of a tile together that several clusters hold. Nobody waits for anybody: each
// writes its sums, and the last to arrive adds all of them in the order of K, so that the result
// does not depend on who that is. Works by warpgroup.
template <class T>
class Combiner {
 public:
  using Sums = float (&)[T::kParts][T::kSums];

  __device__ Combiner(const Params& p, uint32_t smem, int cluster, int rank, int warpgroup)
      : p_(p),
        ticket_(smem + T::kTickets + 4 * warpgroup),
        cluster_(cluster),
        rank_(rank),
        warpgroup_(warpgroup) {}

  // Whether the warpgroup holds the finished sums now.
  __device__ bool combine(const Job& job, Sums sums) const {
    const int others = job.last - job.first;
    uint32_t* counter = p_.counters + (job.first * T::kClusterSize + rank_) * 2 + warpgroup_;
    // The last may leave its own in registers: few of them, for a copy, or else where they are one
    // of two or come first.
    constexpr bool kFew = T::kTokens <= 32;
    const bool may_keep = kFew || others == 1 || cluster_ == job.first;
    if (may_keep && share([&] { return ptx::load_relaxed(counter); }) == others) {
      if (thread() == 0) ptx::store_relaxed(counter, 0);
      ptx::fence_gpu();
      if constexpr (kFew) {
        float own[T::kParts][T::kSums];
        memcpy(own, sums, sizeof own);
        clear(sums);
        add_all(job, cluster_, sums, &own);
      } else {
        add_all(job, cluster_, sums);
      }
      return true;
    }
    store(place(cluster_, job.begin == 0), sums);
    ptx::named_barrier_sync(1 + warpgroup_, 128);
    // Ordered after every store of the warpgroup by the barrier. Back to 0 after the last.
    if (share([&] { return ptx::atomic_ticket(counter, others); }) != others) return false;
    ptx::fence_gpu();
    clear(sums);
    add_all(job, -1, sums);
    return true;
  }

 private:
  static constexpr int kVectors = T::kParts * T::kSums / 4;  // of 4 sums, of a thread

  __device__ static int thread() { return threadIdx.x % 128; }

  // What thread 0 finds, told to the warpgroup.
  template <class Find>
  __device__ int share(Find find) const {
    if (thread() == 0) ptx::store_shared(ticket_, find());
    ptx::named_barrier_sync(1 + warpgroup_, 128);
    const uint32_t found = ptx::load_shared(ticket_);
    ptx::named_barrier_sync(1 + warpgroup_, 128);
    return static_cast<int>(found);
  }
  __device__ float4* place(int cluster, bool holds_step_zero) const {
    const int slot = heuristics::partial_slot(cluster, holds_step_zero) * T::kClusterSize + rank_;
    return reinterpret_cast<float4*>(p_.partials) +
           static_cast<int64_t>(slot) * (kVectors * T::kConsumerThreads) + warpgroup_ * 128 +
           thread();
  }
  __device__ static void store(float4* to, Sums sums) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float* v = &sums[i / (T::kSums / 4)][i % (T::kSums / 4) * 4];
      __stcg(to + i * T::kConsumerThreads, make_float4(v[0], v[1], v[2], v[3]));
    }
  }
  // Adds the partial sums of all clusters of the tile, in the order of K. Those of `mine` are not
  // read: they are `own`, or in the sums already. Up to 16 loads of a thread are under way at a
  // time.
  __device__ __forceinline__ void add_all(const Job& job, int mine, Sums sums,
                                          const float (*own)[T::kParts][T::kSums] = nullptr) const {
    constexpr int kMost = kVectors > 32 ? 4 : 16;
    constexpr int kDeep = kVectors < kMost ? kVectors : kMost, kWide = kDeep <= 4 ? 4 : 1;
    for (int c = job.first; c <= job.last; c += kWide) {
#pragma unroll
      for (int i = 0; i < kVectors; i += kDeep) {
        float4 v[kWide][kDeep];
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          const bool wanted = c + j <= job.last && c + j != mine;
          const float4* from = place(c + j, c + j == job.first) + i * T::kConsumerThreads;
#pragma unroll
          for (int d = 0; d < kDeep; ++d) {
            v[j][d] =
                wanted && i + d < kVectors ? __ldcg(from + d * T::kConsumerThreads) : float4{};
          }
        }
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
#pragma unroll
          for (int d = 0; d < kDeep; ++d) {
            if (i + d >= kVectors) continue;
            if (own && c + j == mine) {
              const float* o = &(*own)[(i + d) / (T::kSums / 4)][(i + d) % (T::kSums / 4) * 4];
              v[j][d] = make_float4(o[0], o[1], o[2], o[3]);
            }
            float* to = &sums[(i + d) / (T::kSums / 4)][(i + d) % (T::kSums / 4) * 4];
            to[0] += v[j][d].x;
            to[1] += v[j][d].y;
            to[2] += v[j][d].z;
            to[3] += v[j][d].w;
          }
        }
      }
    }
  }

  const Params& p_;
  uint32_t ticket_;
  int cluster_, rank_, warpgroup_;
};

}  // namespace spense::sm90
