// SPDX-License-Identifier: Apache-2.0
// Sums of a tile that several CTAs hold parts of, put together in the order of K.
//
// Fragment: thread t of a warpgroup holds rows 16 * (t / 32) + t % 32 / 4 (+ 8) of its 64 and
// tokens 8 * j + t % 4 * 2 (+ 1): sums[4 j + 2 * (row + 8 ?) + (token + 1 ?)].
#pragma once

#include "device/ptx.cuh"
#include "sm90/traits.cuh"

namespace spense::sm90 {

// Brings the sums of the CTAs together that split the K of a tile: each sends the others their
// share of the tokens, through L2, and keeps its own. They are of one cluster and so run at the
// same time, which is why they may wait for one another. Works by warpgroup, once a launch.
template <class T>
class Exchange {
 public:
  __device__ Exchange(const Params& p, uint32_t smem, int cluster, int row, int split,
                      int warpgroup)
      : arrived_(smem + T::kExchanged + 8 * heuristics::kMaxSplits * warpgroup),
        buffer_(reinterpret_cast<float4*>(p.exchange) +
                (static_cast<int64_t>(cluster) * T::kClusterRows + row) * kBuffer +
                warpgroup * 128 + threadIdx.x % 128),
        row_(row),
        split_(split),
        warpgroup_(warpgroup) {}

  __device__ void run(const float (&sums)[T::kParts][T::kSums],
                      float (&own)[T::kParts][T::kOwnSums]) const {
#pragma unroll
    for (int to = 0; to < T::kSplits; ++to) {
      if (to == split_) continue;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (inside(to, i)) __stcg(place(to, split_) + i * kStride, vector(sums, to, i));
      }
    }
    ptx::named_barrier_sync(1 + warpgroup_, 128);
    const int thread = threadIdx.x % 128;
    if (thread < T::kSplits && thread != split_) {
      ptx::fence_gpu();
      ptx::barrier_arrive_remote(arrived_ + 8 * split_, thread * T::kClusterRows + row_);
    }
    for (int from = 0; from < T::kSplits; ++from) {
      if (from != split_) ptx::barrier_wait_cluster(arrived_ + 8 * from, 0);
    }
    // In the order of K, so that the result is the same whoever computes it.
    float4 got[T::kSplits][kVectors];
#pragma unroll
    for (int from = 0; from < T::kSplits; ++from) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (from != split_ && inside(split_, i)) {
          got[from][i] = __ldcg(place(split_, from) + i * kStride);
        } else {
          got[from][i] = mine(sums, i);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float4 v = got[0][i];
#pragma unroll
      for (int from = 1; from < T::kSplits; ++from) {
        v.x += got[from][i].x;
        v.y += got[from][i].y;
        v.z += got[from][i].z;
        v.w += got[from][i].w;
      }
      float* to = &own[i / kOwn][i % kOwn * 4];
      to[0] = v.x;
      to[1] = v.y;
      to[2] = v.z;
      to[3] = v.w;
    }
  }

 private:
  static constexpr int kOwn = T::kOwnSums / 4, kVectors = T::kParts * kOwn;
  static constexpr int kStride = T::kConsumerThreads, kShare = kVectors * kStride;
  static constexpr int64_t kBuffer = int64_t{T::kSplits} * T::kSplits * kShare;

  __device__ __forceinline__ float4* place(int to, int from) const {
    return buffer_ + (to * T::kSplits + from) * kShare;
  }
  // Whether vector i of the share of CTA `to` lies in the tile.
  __device__ __forceinline__ static bool inside(int to, int i) {
    return (to * kOwn + i % kOwn) * 4 < T::kSums;
  }
  __device__ __forceinline__ static float4 vector(const float (&sums)[T::kParts][T::kSums], int to,
                                                  int i) {
    if (!inside(to, i)) return float4{};
    const float* v = &sums[i / kOwn][(to * kOwn + i % kOwn) * 4];
    return make_float4(v[0], v[1], v[2], v[3]);
  }
  __device__ __forceinline__ float4 mine(const float (&sums)[T::kParts][T::kSums], int i) const {
    float4 v = {};
#pragma unroll
    for (int to = 0; to < T::kSplits; ++to) {
      if (to == split_) v = vector(sums, to, i);
    }
    return v;
  }

  uint32_t arrived_;
  float4* buffer_;
  int row_, split_, warpgroup_;
};

// The partial sums of tiles that several clusters hold, in L2. Works by warpgroup.
template <class T>
class Partials {
 public:
  using Sums = float (&)[T::kParts][T::kSums];

  __device__ Partials(const Params& p, uint32_t smem, int cluster, int rank, int warpgroup)
      : p_(p),
        found_(smem + T::kArrived + 4 * warpgroup),
        cluster_(cluster),
        rank_(rank),
        warpgroup_(warpgroup) {}

 protected:
  static constexpr int kPartVectors = T::kSums / 4;  // of 4 sums, of a thread
  static constexpr int kVectors = T::kParts * kPartVectors;

  __device__ static int thread() { return threadIdx.x % 128; }

  __device__ uint32_t* counter(const Job& job) const {
    return p_.counters + (job.first * T::kClusterSize + rank_) * 2 + warpgroup_;
  }
  // What thread 0 finds, told to the warpgroup.
  template <class Find>
  __device__ uint32_t share(Find find) const {
    if (thread() == 0) ptx::store_shared(found_, find());
    ptx::named_barrier_sync(1 + warpgroup_, 128);
    const uint32_t found = ptx::load_shared(found_);
    ptx::named_barrier_sync(1 + warpgroup_, 128);
    return found;
  }
  __device__ float4* place(int cluster, bool holds_step_zero) const {
    const int slot = heuristics::partial_slot(cluster, holds_step_zero) * T::kClusterSize + rank_;
    return reinterpret_cast<float4*>(p_.partials) +
           static_cast<int64_t>(slot) * (kVectors * T::kConsumerThreads) + warpgroup_ * 128 +
           thread();
  }
  // Those of this cluster, which everybody may read after the next atomic operation of thread 0.
  __device__ void publish(const Job& job, Sums sums) const {
    float4* to = place(cluster_, job.begin == 0);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float* v = &sums[i / kPartVectors][i % kPartVectors * 4];
      __stcg(to + i * T::kConsumerThreads, make_float4(v[0], v[1], v[2], v[3]));
    }
    ptx::named_barrier_sync(1 + warpgroup_, 128);
  }

  const Params& p_;
  uint32_t found_;
  int cluster_, rank_, warpgroup_;
};

// Puts the segments of a tile together that several clusters hold. Nobody waits for anybody: each
// writes its sums, and the last to arrive adds all of them in the order of K, so that the result
// does not depend on who that is.
template <class T>
class Combiner : Partials<T> {
 public:
  using Sums = typename Partials<T>::Sums;
  using Partials<T>::Partials;

  // Whether the warpgroup holds the finished sums now.
  __device__ bool combine(const Job& job, Sums sums) const {
    const uint32_t others = job.last - job.first;
    uint32_t* counter = this->counter(job);
    // Where the sums are just two, or these come first, they may stay in registers.
    const bool may_keep = others == 1 || cluster_ == job.first;
    if (may_keep && share([&] { return ptx::load_relaxed(counter); }) == others) {
      if (thread() == 0) ptx::store_relaxed(counter, 0);
      ptx::fence_gpu();
      add_all(job, cluster_, sums);
      return true;
    }
    this->publish(job, sums);
    // Back to 0 after the last.
    if (share([&] { return ptx::atomic_ticket(counter, others); }) != others) return false;
    ptx::fence_gpu();
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < T::kSums; ++i) sums[part][i] = 0;
    }
    add_all(job, -1, sums);
    return true;
  }

 private:
  using Partials<T>::cluster_, Partials<T>::place, Partials<T>::share, Partials<T>::thread;
  static constexpr int kVectors = Partials<T>::kVectors;

  // Adds the partial sums of all clusters of the tile but `skip`, in the order of K. Up to 16 loads
  // of a thread are under way at a time.
  __device__ void add_all(const Job& job, int skip, Sums sums) const {
    constexpr int kMost = kVectors > 32 ? 4 : 16;
    constexpr int kDeep = kVectors < kMost ? kVectors : kMost, kWide = kDeep <= 4 ? 4 : 1;
    for (int c = job.first; c <= job.last; c += kWide) {
#pragma unroll
      for (int i = 0; i < kVectors; i += kDeep) {
        float4 v[kWide][kDeep];
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          const bool wanted = c + j <= job.last && c + j != skip;
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
};

}  // namespace spense::sm90
