// SPDX-License-Identifier: Apache-2.0
// Tensor memory and the tcgen05 instructions that the kernels use, written from the PTX
// documentation: descriptors, layouts and the order that it promises. It shares nothing with the
// kernels.
#pragma once

#include "machine.h"

namespace model {

inline constexpr int kLanes = 128, kColumns = 512;

// What is under way in a column of one CTA's tensor memory.
struct Column {
  int writers = 0;           // tensor instructions under way that write it
  int metadata_readers = 0;  // sparse instructions under way that read it
  bool sparse_kind = false;  // of those writers
  bool allocated = false;
  bool written = false;
  uint32_t unread = 0;  // quarters of the lanes that were not read since the last sums
};

struct TensorMemory {
  std::vector<uint32_t> cells = std::vector<uint32_t>(kLanes * kColumns, 0x7FC0DEAD);
  std::array<Column, kColumns> columns;
  int base = 0, allocated = 0;
  uint32_t& at(int lane, int column) { return cells[lane * kColumns + column]; }
  float* row(int lane, int column) { return reinterpret_cast<float*>(&at(lane, column)); }
};

// Each is called by the thread that executes the instruction; the first four by whole warps.
void tmem_allocate(int ctas, uint32_t smem, uint32_t columns);
void tmem_end_allocating(int ctas);
void tmem_free(int ctas, uint32_t address, uint32_t columns);
void tmem_load(float* v, int count, uint32_t address);
void tmem_fence_before();
void tmem_fence_after();
void tmem_copy(int ctas, uint32_t address, uint64_t descriptor);
// off[i]: the rows of CTA i that keep their sums, one word for 32 lanes.
void mma(int ctas, bool sparse, uint32_t sums, uint64_t a, uint64_t b, uint32_t metadata,
         uint32_t instruction, bool accumulate, const uint32_t (&off)[2]);
// In every CTA of the mask; in this one alone for 0.
void tensor_commit(int ctas, uint32_t barrier, uint16_t mask);

// --- shared with SM90 ---
// A K-major operand in shared memory: where byte `byte` of row `row` lies.
struct Operand {
  uint32_t start, leading, stride;
  bool swizzle128;
  uint32_t address(int row, int byte) const;
};
float e4m3(uint8_t bits);
// Bytes of rows x bytes of an operand as floats, and the granules that they lie in.
std::vector<float> read_operand(Cta& cta, const Operand& operand, int rows, int bytes);
// `partly`: the last rows, of no token, need not be there; their sums are never written.
void note_reads(Cta& cta, const Operand& operand, int rows, int bytes, std::vector<Granule*>& to,
                bool partly = false);
// The same column by column, `step` floats apart.
void read_columns(Cta& cta, const Operand& operand, int rows, int bytes, float* to, int step);
// sums[n] += kept values of a row x columns of x, [columns][tokens]; with their places in chunks of
// four where the row is sparse.
void multiply(float* sums, const float* values, const uint8_t* indices, int kept,
              const std::vector<float>& x, int tokens);
// Places of the two kept values of chunk `chunk`, from a row's metadata bytes.
void decode_chunk(const uint8_t* row, int chunk, uint8_t* to);

}  // namespace model
