// SPDX-License-Identifier: Apache-2.0
// Counting comparisons, a shared memory to take addresses in, and the calls of
// cuTensorMapEncodeTiled.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

// CuTe's and ours compared; the first differences of each kind are printed.
void expect(const char* what, uint64_t theirs, uint64_t ours);
// From here on every comparison differs, so that a test can see it noticed.
void disagree();
// Prints how often each kind was compared; the exit code.
int report();

// 256 KiB; addresses in it count from its start.
uint8_t* shared_memory();
size_t __cvta_generic_to_shared(const void* pointer);

struct TensorMapCall {
  const void* base = nullptr;
  uint32_t rank = 0;
  int element_bytes = 0, interleave = 0, swizzle = 0, fill = 0;
  std::array<uint64_t, 5> size{}, stride{};
  std::array<uint32_t, 5> box{}, step{};
};
TensorMapCall last_tensor_map();
// Same bytes to the same places: all but the preference for L2 and modes of size one.
void expect_same_map(const char* what, const TensorMapCall& theirs, const TensorMapCall& ours);
