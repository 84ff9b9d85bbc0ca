// SPDX-License-Identifier: Apache-2.0
// Takes the place of csrc/device/tcgen05.cuh: the same leaves on model::machine().
#pragma once

#include "device/ptx.cuh"
#include "tensor_core.h"

namespace spense::ptx {

template <int kCtas>
void tmem_allocate(uint32_t smem, uint32_t columns) {
  model::tmem_allocate(kCtas, smem, columns);
}
template <int kCtas>
void tmem_end_allocating() {
  model::tmem_end_allocating(kCtas);
}
template <int kCtas>
void tmem_free(uint32_t tmem, uint32_t columns) {
  model::tmem_free(kCtas, tmem, columns);
}
inline void tmem_fence_before() { model::tmem_fence_before(); }
inline void tmem_fence_after() { model::tmem_fence_after(); }
template <int kCount>
void tmem_load(float (&v)[kCount], uint32_t tmem) {
  model::tmem_load(v, kCount, tmem);
}
template <int kCtas>
void tmem_copy(uint32_t tmem, uint64_t descriptor) {
  model::tmem_copy(kCtas, tmem, descriptor);
}
struct RowsOff {
  uint32_t cta[2];
};
template <int kCtas>
void mma_dense(uint32_t sums, uint64_t w, uint64_t x, uint32_t instruction, bool accumulate,
               RowsOff off) {
  if (kCtas == 1) off = {};  // takes no mask
  model::mma(kCtas, false, sums, w, x, 0, instruction, accumulate, off.cta);
}
template <int kCtas>
void mma_sparse(uint32_t sums, uint64_t w, uint64_t x, uint32_t metadata, uint32_t instruction,
                bool accumulate, RowsOff off) {
  if (kCtas == 1) off = {};
  model::mma(kCtas, true, sums, w, x, metadata, instruction, accumulate, off.cta);
}
template <int kCtas>
void tensor_commit(uint32_t barrier, uint16_t mask) {
  model::tensor_commit(kCtas, barrier, mask);
}
template <int kCtas>
void tensor_commit_here(uint32_t barrier) {
  model::tensor_commit(kCtas, barrier, 0);
}
uint32_t remote_smem(uint32_t smem, uint32_t rank);
void tensor_copy_2d_pair(uint32_t smem, const void* map, int column, int row, uint32_t barrier,
                         uint64_t);
void tensor_copy_2d_pair_multicast(uint32_t smem, const void* map, int column, int row,
                                   uint32_t barrier, uint16_t mask, uint64_t);

}  // namespace spense::ptx
