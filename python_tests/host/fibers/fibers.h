// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the host, one fiber a thread and one host thread a CTA, so that barriers,
// shuffles and clusters are what they are on a GPU. `__shared__` is thread_local: one copy a CTA,
// at the same distance from the thread pointer in each, which is how CTAs of a cluster find each
// other's.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "core/fp8.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};

namespace fibers {

struct Barrier {
  int count = 0, generation = 0;
};

struct Cluster {
  int ctas = 1;
  std::atomic<int> arrived{0}, generation{0};
  std::vector<char*> thread_pointers;
};

struct Cta;
struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  dim3 thread;
  int arrivals = 0;  // at the cluster's barrier
  bool done = false;
};

struct Cta {
  dim3 block, grid, threads;
  unsigned rank = 0;
  Cluster* cluster = nullptr;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<std::array<uint64_t, 32>> lanes;
  int cluster_arrivals = 0;
  std::vector<Fiber> fibers;
  ucontext_t scheduler{};
  std::function<void()> body;
};

inline thread_local Cta* cta = nullptr;
inline thread_local Fiber* fiber = nullptr;

inline void yield() { swapcontext(&fiber->context, &cta->scheduler); }

inline void wait_at(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.count == count) {
    barrier.count = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void entry() {
  cta->body();
  fiber->done = true;
  yield();
}

inline void run_cta(Cta& one) {
  cta = &one;
  const unsigned count = one.threads.x;
  one.warps.resize(count / 32);
  one.lanes.resize(count / 32);
  one.fibers.resize(count);
  constexpr size_t kStack = 64 << 10;
  for (unsigned t = 0; t < count; ++t) {
    Fiber& f = one.fibers[t];
    f.thread = dim3(t, 0, 0);
    f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    makecontext(&f.context, entry, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (Fiber& f : one.fibers) {
      if (f.done) continue;
      alive = true;
      fiber = &f;
      swapcontext(&one.scheduler, &f.context);
    }
    if (one.cluster->ctas > 1) std::this_thread::yield();
  }
}

// Clusters lie along x; one runs after the other.
inline void run_grid(dim3 grid, dim3 threads, int cluster_size, const std::function<void()>& body) {
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += cluster_size) {
      Cluster cluster;
      cluster.ctas = cluster_size;
      cluster.thread_pointers.resize(cluster_size);
      std::atomic<int> ready{0};
      std::vector<std::thread> hosts;
      for (int rank = 0; rank < cluster_size; ++rank) {
        hosts.emplace_back([&, rank] {
          Cta one;
          one.block = dim3(x + rank, y, 0);
          one.grid = grid;
          one.threads = threads;
          one.rank = rank;
          one.cluster = &cluster;
          one.body = body;
          cluster.thread_pointers[rank] = static_cast<char*>(__builtin_thread_pointer());
          ++ready;
          while (ready < cluster_size) std::this_thread::yield();
          run_cta(one);
        });
      }
      for (auto& host : hosts) host.join();
    }
  }
}

}  // namespace fibers

#define threadIdx (::fibers::fiber->thread)
#define blockIdx (::fibers::cta->block)
#define blockDim (::fibers::cta->threads)
#define gridDim (::fibers::cta->grid)

inline void __syncthreads() {
  fibers::wait_at(fibers::cta->all, static_cast<int>(fibers::cta->threads.x));
}
inline void __syncwarp() { fibers::wait_at(fibers::cta->warps[threadIdx.x / 32], 32); }
template <typename V>
V __shfl_xor_sync(unsigned, V v, int mask) {
  static_assert(sizeof(V) <= 8);
  auto& lanes = fibers::cta->lanes[threadIdx.x / 32];
  std::memcpy(&lanes[threadIdx.x % 32], &v, sizeof v);
  __syncwarp();
  V other;
  std::memcpy(&other, &lanes[threadIdx.x % 32 ^ mask], sizeof v);
  __syncwarp();
  return other;
}

template <typename V>
V __shfl_sync(unsigned, V v, int lane) {
  auto& lanes = fibers::cta->lanes[threadIdx.x / 32];
  std::memcpy(&lanes[threadIdx.x % 32], &v, sizeof v);
  __syncwarp();
  V other;
  std::memcpy(&other, &lanes[lane % 32], sizeof v);
  __syncwarp();
  return other;
}
inline uint32_t __reduce_max_sync(unsigned all, uint32_t v) {
  for (int step = 16; step > 0; step /= 2) v = std::max(v, __shfl_xor_sync(all, v, step));
  return v;
}

template <typename V>
V max(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
V min(V a, V b) {
  return a < b ? a : b;
}
template <typename V>
V __ldg(const V* from) {
  return *from;
}
template <typename V>
V __ldcs(const V* from) {
  return *from;
}
inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (static_cast<uint64_t>(a) * b) >> 32; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xFFFF, b & 0xFFFF);
}
inline double __hiloint2double(int high, int low) {
  return std::bit_cast<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 |
                               static_cast<uint32_t>(low));
}
inline float2 make_float2(float x, float y) { return {x, y}; }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half v) { return spense::fp16_to_float(v.bits); }
inline float __bfloat162float(__nv_bfloat16 v) { return spense::bf16_to_float(v.bits); }
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __half2 __floats2half2_rn(float a, float b) {
  return {{spense::fp16_from_float(a)}, {spense::fp16_from_float(b)}};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {{spense::bf16_from_float(a)}, {spense::bf16_from_float(b)}};
}

enum { __NV_SATFINITE, __NV_E4M3 };
inline uint16_t __nv_cvt_float2_to_fp8x2(float2 v, int, int) {
  return static_cast<uint16_t>(spense::e4m3_from_float(v.x) | spense::e4m3_from_float(v.y) << 8);
}
