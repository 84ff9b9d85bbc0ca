// SPDX-License-Identifier: Apache-2.0
// Tiles of the last round, cut into pieces for as many clusters as there are (Mode::kTail).
//
// Each cluster works on its piece first, writes its sums and goes on to its whole tiles; after them
// it finishes its share of the cut tile's tokens, for which by then all sums have long been there.
// Nobody waits for anybody: whose share is due before they are leaves it to the last that arrives.
#pragma once

#include "sm90/reduce.cuh"

namespace spense::sm90 {

// The traits of what is finished at a time.
template <class T>
struct Share : T {
  static constexpr int kOwnTokens = heuristics::kStagedTokens, kOwnSums = kOwnTokens / 2;
};

// Works by warpgroup. The counter of a tile, zero between launches: pieces that have arrived, shares
// that are finished, and a bit for each share that its owner has asked for.
template <class T>
class Pieces : Partials<T> {
 public:
  using Sums = typename Partials<T>::Sums;
  using Partials<T>::Partials;

  // Writes this cluster's sums. Returns the shares that others have left to it, by bits.
  __device__ uint32_t arrive(const Job& job, Sums sums) const {
    this->publish(job, sums);
    const uint32_t before = share([&] { return ptx::atomic_add(counter(job), kArrived); });
    return arrived(before) == pieces(job) - 1 ? before / kAsked : 0;
  }

  // After the whole tiles: this cluster's own share, or none if it is left to the last to arrive.
  __device__ uint32_t ask(const Job& job) const {
    const uint32_t own = 1u << (cluster_ - job.first);
    const uint32_t before = share([&] { return ptx::atomic_add(counter(job), kAsked * own); });
    return arrived(before) == pieces(job) ? own : 0;
  }

  // Adds up 32 tokens at a time, in the order of K, and calls store(group of tokens, part, sums).
  template <class Store>
  __device__ void finish(const Job& job, uint32_t shares, Store store) const {
    if (shares == 0) return;
    ptx::fence_gpu();
    const uint32_t count = pieces(job);
    const uint32_t groups = (p_.tile_tokens + kGroup - 1) / kGroup;
    for (uint32_t i = 0; i < count; ++i) {
      if ((shares >> i & 1) == 0) continue;
      for (uint32_t group = groups * i / count; group < groups * (i + 1) / count; ++group) {
#pragma unroll
        for (int part = 0; part < T::kParts; ++part) {
          float sums[Share<T>::kOwnSums] = {};
          add(job, part, group, sums);
          store(group, part, sums);
        }
      }
      if (thread() == 0 && ptx::atomic_add(counter(job), kFinished) / kFinished % 256 == count - 1) {
        ptx::store_relaxed(counter(job), 0);
      }
    }
  }

 private:
  using Partials<T>::p_, Partials<T>::cluster_;
  using Partials<T>::counter, Partials<T>::place, Partials<T>::share, Partials<T>::thread;
  static constexpr uint32_t kArrived = 1, kFinished = 1 << 8, kAsked = 1 << 16;
  static constexpr int kGroup = Share<T>::kOwnTokens;
  static constexpr int kWide = 4, kVectors = Share<T>::kOwnSums / 4;

  __device__ static uint32_t pieces(const Job& job) { return job.last - job.first + 1; }
  __device__ static uint32_t arrived(uint32_t counter) { return counter % kFinished; }

  __device__ void add(const Job& job, int part, int group,
                      float (&sums)[Share<T>::kOwnSums]) const {
    constexpr int kAll = Partials<T>::kPartVectors;
    const int first = (part * kAll + group * kVectors) * T::kConsumerThreads;
    for (int c = job.first; c <= job.last; c += kWide) {
      float4 v[kWide][kVectors];
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const float4* from = place(c + j, c + j == job.first) + first;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const bool inside = kAll % kVectors == 0 || group * kVectors + i < kAll;
          v[j][i] = c + j <= job.last && inside ? __ldcg(from + i * T::kConsumerThreads) : float4{};
        }
      }
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          sums[4 * i] += v[j][i].x;
          sums[4 * i + 1] += v[j][i].y;
          sums[4 * i + 2] += v[j][i].z;
          sums[4 * i + 3] += v[j][i].w;
        }
      }
    }
  }
};

}  // namespace spense::sm90
