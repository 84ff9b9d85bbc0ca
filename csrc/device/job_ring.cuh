// SPDX-License-Identifier: Apache-2.0
// Rings in shared memory: a place in one, and the one by which a warp that walks the schedule tells
// the others of its CTA what to do.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"

namespace spense::device {

// A place in a ring and the parity of the pass over it.
template <int kStages>
struct Cursor {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Four words of a job in shared memory.
__device__ __forceinline__ int4 load_words(uint32_t smem) {
  const uint4 v = ptx::load_shared_v4(smem);
  return int4{static_cast<int32_t>(v.x), static_cast<int32_t>(v.y), static_cast<int32_t>(v.z),
              static_cast<int32_t>(v.w)};
}

// Job: plain words, a multiple of 16 bytes, and `load`, which reads them one by one: what a memcpy
// or a loop brings makes kernels up to 10 % longer (M = 64: 3 % slower). T says where: kJobs, and
// the barriers kJobFull, completed by the weight warp, and kJobEmpty, by whoever else has read the
// job.
template <class T, class Job>
class JobRing {
 public:
  __device__ explicit JobRing(uint32_t smem) : smem_(smem) {}

  // The weight warp.
  __device__ void put(const Job& job) {
    ptx::barrier_wait(smem_ + T::kJobEmpty + 8 * at_.slot, at_.parity ^ 1);
    __syncwarp();  // a lane that lags here could miss two phases
    if (ptx::lane_id() == 0) {
      uint4 words[kVectors];
      memcpy(words, &job, sizeof(Job));
#pragma unroll
      for (int i = 0; i < kVectors; ++i) ptx::store_shared_v4(place() + 16 * i, words[i]);
      ptx::barrier_arrive(smem_ + T::kJobFull + 8 * at_.slot);
    }
    at_.advance();
  }

  // Everybody else: wait, read as often as needed, then one thread of each warp tells that it is
  // done, after all of the warp that read.
  __device__ void wait() const {
    ptx::barrier_wait(smem_ + T::kJobFull + 8 * at_.slot, at_.parity);
  }
  __device__ Job read() const { return Job::load(place()); }
  __device__ void done(bool tell) {
    if (tell) ptx::barrier_arrive(smem_ + T::kJobEmpty + 8 * at_.slot);
    at_.advance();
  }

 private:
  static constexpr int kVectors = sizeof(Job) / 16;
  static_assert(sizeof(Job) % 16 == 0);

  __device__ uint32_t place() const {
    return smem_ + T::kJobs + at_.slot * static_cast<uint32_t>(sizeof(Job));
  }

  uint32_t smem_;
  Cursor<T::kJobStages> at_;
};

}  // namespace spense::device
