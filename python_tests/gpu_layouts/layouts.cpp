// SPDX-License-Identifier: Apache-2.0
#include "layouts.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <map>

namespace {

struct Count {
  long compared = 0, different = 0;
};
std::map<std::string, Count> g_counts;
TensorMapCall g_last;
bool g_disagree = false;
alignas(1 << 18) uint8_t g_shared[1 << 18];

}  // namespace

void expect(const char* what, uint64_t theirs, uint64_t ours) {
  Count& count = g_counts[what];
  ++count.compared;
  if (g_disagree) ours = ~theirs;
  if (theirs == ours) return;
  if (++count.different <= 4) {
    std::printf("%s: CuTe %#llx, ours %#llx\n", what, static_cast<unsigned long long>(theirs),
                static_cast<unsigned long long>(ours));
  }
}

void disagree() { g_disagree = true; }

int report() {
  bool same = true;
  for (const auto& [what, count] : g_counts) {
    std::printf("%-28s %8ld compared, %ld different\n", what.c_str(), count.compared,
                count.different);
    same = same && count.different == 0;
  }
  return same ? 0 : 1;
}

uint8_t* shared_memory() { return g_shared; }
size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<size_t>(static_cast<const uint8_t*>(pointer) - g_shared);
}

TensorMapCall last_tensor_map() { return g_last; }

void expect_same_map(const char* what, const TensorMapCall& theirs, const TensorMapCall& ours) {
  const std::string prefix = what;
  const auto each = [&](const char* part, uint64_t a, uint64_t b) {
    expect((prefix + ", " + part).c_str(), a, b);
  };
  each("base", reinterpret_cast<uint64_t>(theirs.base), reinterpret_cast<uint64_t>(ours.base));
  each("element", theirs.element_bytes, ours.element_bytes);
  each("interleave", theirs.interleave, ours.interleave);
  each("swizzle", theirs.swizzle, ours.swizzle);
  each("fill", theirs.fill, ours.fill);
  for (int i = 0; i < 5; ++i) {
    const auto size = [&](const TensorMapCall& c) { return i < int(c.rank) ? c.size[i] : 1; };
    const auto box = [&](const TensorMapCall& c) { return i < int(c.rank) ? c.box[i] : 1; };
    const auto step = [&](const TensorMapCall& c) { return i < int(c.rank) ? c.step[i] : 1; };
    each("size", size(theirs), size(ours));
    each("box", box(theirs), box(ours));
    each("step", step(theirs), step(ours));
    if (i + 1 < int(ours.rank)) each("stride", theirs.stride[i], ours.stride[i]);
  }
}

// --- in the place of the driver and of the runtime ---------------------------------------------

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank,
                                           void* base, const cuuint64_t* size,
                                           const cuuint64_t* stride, const cuuint32_t* box,
                                           const cuuint32_t* step, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill fill) {
  g_last = {};
  g_last.base = base;
  g_last.rank = rank;
  g_last.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : -1;
  g_last.interleave = interleave;
  g_last.swizzle = swizzle;
  g_last.fill = fill;
  for (uint32_t i = 0; i < rank; ++i) {
    g_last.size[i] = size[i];
    g_last.box[i] = box[i];
    g_last.step[i] = step[i];
    if (i + 1 < rank) g_last.stride[i] = stride[i];
  }
  return CUDA_SUCCESS;
}

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned int,
                                                        unsigned long long,
                                                        cudaDriverEntryPointQueryResult* found) {
  *entry = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
extern "C" const char* cudaGetErrorName(cudaError_t) { return "error"; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "error"; }
