// SPDX-License-Identifier: Apache-2.0
// PTX leaves of the fifth-generation tensor cores: one instruction each, no policy. kCtas is the
// cta_group, the same in all instructions of a kernel. CuTe's atoms would elect a lane inside and
// take no mask of output lanes.
#pragma once

#include <cstdint>

namespace spense::ptx {

// --- tensor memory: 128 lanes x 512 columns of 32 bits, address = lane << 16 | column ----------

// Writes the address to shared memory. The whole warp; with kCtas 2 the same warp of both CTAs.
template <int kCtas>
__device__ __forceinline__ void tmem_allocate(uint32_t smem, uint32_t columns) {
  if constexpr (kCtas == 1) {
    asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(smem),
                 "r"(columns)
                 : "memory");
  } else {
    asm volatile("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(smem),
                 "r"(columns)
                 : "memory");
  }
}

// Lets other CTAs of the multiprocessor allocate.
template <int kCtas>
__device__ __forceinline__ void tmem_end_allocating() {
  if constexpr (kCtas == 1) {
    asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;");
  } else {
    asm volatile("tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned;");
  }
}

template <int kCtas>
__device__ __forceinline__ void tmem_free(uint32_t tmem, uint32_t columns) {
  if constexpr (kCtas == 1) {
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(tmem), "r"(columns));
  } else {
    asm volatile("tcgen05.dealloc.cta_group::2.sync.aligned.b32 %0, %1;" ::"r"(tmem), "r"(columns));
  }
}

// Orders this thread's tensor-memory accesses before what it signals next, or behind what it has
// just waited for.
__device__ __forceinline__ void tmem_fence_before() {
  asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
}
__device__ __forceinline__ void tmem_fence_after() {
  asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
}

// 16 or 32 columns of this warp's 32 lanes, one lane a thread. Complete when it returns: one
// statement, so that nothing that reads the registers can move between load and wait.
__device__ __forceinline__ void tmem_load(float (&v)[16], uint32_t tmem) {
  asm volatile(
      "tcgen05.ld.sync.aligned.32x32b.x16.b32"
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, [%16];\n"
      "tcgen05.wait::ld.sync.aligned;"
      : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]), "=f"(v[4]), "=f"(v[5]), "=f"(v[6]),
        "=f"(v[7]), "=f"(v[8]), "=f"(v[9]), "=f"(v[10]), "=f"(v[11]), "=f"(v[12]), "=f"(v[13]),
        "=f"(v[14]), "=f"(v[15])
      : "r"(tmem)
      : "memory");
}
__device__ __forceinline__ void tmem_load(float (&v)[32], uint32_t tmem) {
  asm volatile(
      "tcgen05.ld.sync.aligned.32x32b.x32.b32"
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19,"
      " %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, [%32];\n"
      "tcgen05.wait::ld.sync.aligned;"
      : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]), "=f"(v[4]), "=f"(v[5]), "=f"(v[6]),
        "=f"(v[7]), "=f"(v[8]), "=f"(v[9]), "=f"(v[10]), "=f"(v[11]), "=f"(v[12]), "=f"(v[13]),
        "=f"(v[14]), "=f"(v[15]), "=f"(v[16]), "=f"(v[17]), "=f"(v[18]), "=f"(v[19]), "=f"(v[20]),
        "=f"(v[21]), "=f"(v[22]), "=f"(v[23]), "=f"(v[24]), "=f"(v[25]), "=f"(v[26]), "=f"(v[27]),
        "=f"(v[28]), "=f"(v[29]), "=f"(v[30]), "=f"(v[31])
      : "r"(tmem)
      : "memory");
}

// --- issued by one thread ----------------------------------------------------------------------

// 128 rows x 16 bytes of shared memory to four columns; with kCtas 2 in both CTAs.
template <int kCtas>
__device__ __forceinline__ void tmem_copy(uint32_t tmem, uint64_t descriptor) {
  if constexpr (kCtas == 1) {
    asm volatile("tcgen05.cp.cta_group::1.128x128b [%0], %1;" ::"r"(tmem), "l"(descriptor)
                 : "memory");
  } else {
    asm volatile("tcgen05.cp.cta_group::2.128x128b [%0], %1;" ::"r"(tmem), "l"(descriptor)
                 : "memory");
  }
}

// Rows of CTA i whose word off[i] is all ones keep their sums.
struct RowsOff {
  uint32_t cta[2];
};

// sums = w * x (+ sums when accumulate): 128 rows a CTA, 32 columns.
template <int kCtas>
__device__ __forceinline__ void mma_dense(uint32_t sums, uint64_t w, uint64_t x,
                                          uint32_t instruction, bool accumulate, RowsOff off) {
  const uint32_t more = accumulate;
  if constexpr (kCtas == 1) {
    asm volatile(
        "{\n"
        ".reg .pred more;\n"
        "setp.ne.u32 more, %4, 0;\n"
        "tcgen05.mma.cta_group::1.kind::f8f6f4 [%0], %1, %2, %3, more;\n"
        "}" ::"r"(sums),
        "l"(w), "l"(x), "r"(instruction), "r"(more)
        : "memory");
  } else {
    asm volatile(
        "{\n"
        ".reg .pred more;\n"
        "setp.ne.u32 more, %4, 0;\n"
        "tcgen05.mma.cta_group::2.kind::f8f6f4 [%0], %1, %2, %3,"
        " {%5, %5, %5, %5, %6, %6, %6, %6}, more;\n"
        "}" ::"r"(sums),
        "l"(w), "l"(x), "r"(instruction), "r"(more), "r"(off.cta[0]), "r"(off.cta[1])
        : "memory");
  }
}

// The same with 2:4 sparse weights, 64 logical columns; metadata in tensor memory.
template <int kCtas>
__device__ __forceinline__ void mma_sparse(uint32_t sums, uint64_t w, uint64_t x, uint32_t metadata,
                                           uint32_t instruction, bool accumulate, RowsOff off) {
  const uint32_t more = accumulate;
  if constexpr (kCtas == 1) {
    asm volatile(
        "{\n"
        ".reg .pred more;\n"
        "setp.ne.u32 more, %5, 0;\n"
        "tcgen05.mma.sp.cta_group::1.kind::f8f6f4 [%0], %1, %2, [%3], %4, more;\n"
        "}" ::"r"(sums),
        "l"(w), "l"(x), "r"(metadata), "r"(instruction), "r"(more)
        : "memory");
  } else {
    asm volatile(
        "{\n"
        ".reg .pred more;\n"
        "setp.ne.u32 more, %5, 0;\n"
        "tcgen05.mma.sp.cta_group::2.kind::f8f6f4 [%0], %1, %2, [%3], %4,"
        " {%6, %6, %6, %6, %7, %7, %7, %7}, more;\n"
        "}" ::"r"(sums),
        "l"(w), "l"(x), "r"(metadata), "r"(instruction), "r"(more), "r"(off.cta[0]), "r"(off.cta[1])
        : "memory");
  }
}

// Arrives at the barrier, with kCtas 2 in all CTAs of `mask`, when all that this thread has issued
// before is complete.
template <int kCtas>
__device__ __forceinline__ void tensor_commit(uint32_t barrier, uint16_t mask) {
  if constexpr (kCtas == 1) {
    asm volatile(
        "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(barrier)
        : "memory");
  } else {
    asm volatile(
        "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64"
        " [%0], %1;" ::"r"(barrier),
        "h"(mask)
        : "memory");
  }
}

// The same in this CTA alone.
template <int kCtas>
__device__ __forceinline__ void tensor_commit_here(uint32_t barrier) {
  if constexpr (kCtas == 1) {
    tensor_commit<1>(barrier, 1);
  } else {
    asm volatile(
        "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(barrier)
        : "memory");
  }
}

// --- clusters ----------------------------------------------------------------------------------

// The address of the same place in the CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_smem(uint32_t smem, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem), "r"(rank));
  return remote;
}

// A box to this CTA's shared memory, its bytes counted at a barrier of either CTA of the pair.
__device__ __forceinline__ void tensor_copy_2d_pair(uint32_t smem, const void* map, int column,
                                                    int row, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.cta_group::2.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// The same to the same place of every CTA in `mask`, its bytes counted for each at the barrier with
// the same offset in its pair, in the CTA of the barrier's parity.
__device__ __forceinline__ void tensor_copy_2d_pair_multicast(uint32_t smem, const void* map,
                                                              int column, int row, uint32_t barrier,
                                                              uint16_t mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.cta_group::2.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(smem),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask), "l"(policy)
      : "memory");
}

}  // namespace spense::ptx
