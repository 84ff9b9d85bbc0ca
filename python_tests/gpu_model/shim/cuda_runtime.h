// SPDX-License-Identifier: Apache-2.0
// Takes the place of CUDA's header when the model compiles kernels for the host: the keywords,
// types and functions of CUDA C++ that the kernels use, on model::machine().
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__

using std::max;
using std::min;

namespace model {

// Checks a store to an output of the launch; other memory is the kernel's own.
inline void note_store(const void* to, size_t bytes) {
  const auto* at = static_cast<const uint8_t*>(to);
  for (Region& r : machine().regions) {
    if (at < r.base || at >= r.base + r.bytes) continue;
    machine().global(to, bytes, true);  // also refuses what is not writable
    for (size_t i = 0; i < bytes; ++i) {
      uint8_t& written = r.written[at - r.base + i];
      if (r.name == "y" && written) fail("y is written twice at byte %td", at - r.base);
      written = 1;
    }
  }
}
template <typename T>
T load_global(const T* from) {
  Region& r = machine().global(from, sizeof(T), false);
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) fail("a load that is not aligned");
  if (r.name == "partials" && !r.written[reinterpret_cast<const uint8_t*>(from) - r.base]) {
    fail("a partial sum is read before it was written");
  }
  return *from;
}
struct Index {
  unsigned x, y, z;
};
inline Index thread_index() { return {static_cast<unsigned>(machine().self().index), 0, 0}; }
inline Index block_index() { return {static_cast<unsigned>(machine().self().cta->index), 0, 0}; }
void sync_threads(int id, int count);

}  // namespace model

#define threadIdx (model::thread_index())
#define blockIdx (model::block_index())

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
  uint4() = default;
  uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) : x(x), y(y), z(z), w(w) {}
  uint4(const uint4&) = default;
  uint4& operator=(const uint4& o) {
    model::note_store(this, sizeof *this);
    x = o.x, y = o.y, z = o.z, w = o.w;
    return *this;
  }
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

[[noreturn]] inline void __trap() { model::fail("trap"); }
inline void __syncwarp() { model::machine().meet("__syncwarp", 0); }
inline void __syncthreads() { model::sync_threads(0, 0); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  const auto all = model::machine().meet("__shfl_sync", std::bit_cast<uint32_t>(value));
  return std::bit_cast<T>(static_cast<uint32_t>(all[lane]));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, model::machine().self().lane() ^ distance);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const auto all = model::machine().meet("__ballot_sync", vote);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= static_cast<unsigned>(all[i]) << i;
  return ballot;
}
inline int __popc(unsigned v) { return std::popcount(v); }
template <typename T>
T __ldg(const T* from) {
  return model::load_global(from);
}
template <typename T>
T __ldcg(const T* from) {
  return model::load_global(from);
}
template <typename T>
void __stcg(T* to, T value) {
  model::machine().global(to, sizeof(T), true);
  model::note_store(to, sizeof(T));
  std::memcpy(static_cast<void*>(to), &value, sizeof(T));
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }
