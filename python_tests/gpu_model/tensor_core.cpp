// SPDX-License-Identifier: Apache-2.0
#include "tensor_core.h"

#include <cstring>

namespace model {
namespace {

Cluster& cluster() { return *machine().self().cta->cluster; }

TensorMemory& memory_of(Cta& cta) {
  if (!cta.tmem) cta.tmem = std::make_shared<TensorMemory>();
  return *cta.tmem;
}

void check_group(int ctas) {
  if (static_cast<int>(cluster().ctas.size()) % ctas) fail("cta_group of an odd cluster");
  int& used = machine().cta_group;
  if (used == 0) used = ctas;
  if (used != ctas) fail("instructions of a kernel differ in cta_group");
}

// The CTAs that an instruction of the running thread works in.
std::vector<Cta*> group(int ctas) {
  check_group(ctas);
  if (ctas == 1) return {machine().self().cta};
  const int rank = machine().self().cta->rank;
  if (rank % 2) fail("the pair's instructions come from both of its CTAs");
  return {cluster().ctas[rank], cluster().ctas[rank + 1]};
}

Column& column(Cta& cta, int index) {
  TensorMemory& tmem = memory_of(cta);
  if (index < 0 || index >= kColumns || !tmem.columns[index].allocated) {
    fail("column %d of the tensor memory is not allocated", index);
  }
  return tmem.columns[index];
}

void before_tensor_use() {
  if (machine().self().wants_fence_after) fail("no tcgen05.fence::after_thread_sync since a wait");
}

void add_op(std::function<void()> run, std::vector<Granule*> reads = {}) {
  cluster().tensor[machine().self().cta->index * 4096 + machine().self().index].push_back(
      {std::move(run), std::move(reads)});
}

uint64_t bits(uint64_t of, int from, int count) {
  return of >> from & ((uint64_t{1} << count) - 1);
}

Operand decode_operand(uint64_t descriptor) {
  Operand o;
  o.start = static_cast<uint32_t>(bits(descriptor, 0, 14)) << 4;
  o.leading = static_cast<uint32_t>(bits(descriptor, 16, 14)) << 4;
  o.stride = static_cast<uint32_t>(bits(descriptor, 32, 14)) << 4;
  if (bits(descriptor, 14, 2) || bits(descriptor, 30, 2) || bits(descriptor, 53, 8)) {
    fail("descriptor %#lx sets reserved bits", descriptor);
  }
  if (bits(descriptor, 46, 3) != 1) fail("descriptor %#lx lacks its fixed 0b001", descriptor);
  if (bits(descriptor, 49, 3)) fail("descriptor %#lx: base offset where none is due", descriptor);
  if (bits(descriptor, 52, 1)) fail("descriptor %#lx: absolute leading address", descriptor);
  const uint64_t swizzle = bits(descriptor, 61, 3);
  if (swizzle != 0 && swizzle != 2) fail("descriptor %#lx: another swizzle", descriptor);
  o.swizzle128 = swizzle == 2;
  return o;
}

struct Instruction {
  int rows, tokens;
};
Instruction decode_instruction(uint32_t d, bool sparse, int ctas) {
  if (bits(d, 0, 2)) fail("instruction %#x: a sparsity selector other than 0", d);
  if (bits(d, 2, 1) != sparse) fail("instruction %#x: sparsity is not that of the opcode", d);
  if (bits(d, 4, 2) != 1) fail("instruction %#x: sums are not float32", d);
  if (bits(d, 7, 3) || bits(d, 10, 3)) fail("instruction %#x: operands are not e4m3", d);
  if (bits(d, 3, 1) || bits(d, 6, 1) || bits(d, 13, 4) || bits(d, 23, 1) || bits(d, 29, 3)) {
    fail("instruction %#x: saturation, negation, transposition or reserved bits", d);
  }
  const Instruction i{static_cast<int>(bits(d, 24, 5)) << 4, static_cast<int>(bits(d, 17, 6)) << 3};
  if (i.rows != kLanes * ctas) fail("instruction %#x: %d rows", d, i.rows);
  if (i.tokens < 16 * ctas || i.tokens > 256 || i.tokens % (16 * ctas)) {
    fail("instruction %#x: %d columns", d, i.tokens);
  }
  return i;
}

}  // namespace

// --- whole warps -------------------------------------------------------------------------------

void tmem_allocate(int ctas, uint32_t smem, uint32_t columns) {
  check_group(ctas);
  machine().meet("tcgen05.alloc", columns);
  if (machine().self().lane() != 0) return;
  if (columns < 32 || columns > kColumns || (columns & (columns - 1))) fail("alloc of %u", columns);
  Cta& cta = *machine().self().cta;
  TensorMemory& tmem = memory_of(cta);
  if (tmem.allocated) fail("tensor memory is allocated twice");
  tmem.allocated = static_cast<int>(columns);
  tmem.base = kColumns - tmem.allocated;  // not 0, where it can be helped
  for (int c = tmem.base; c < kColumns; ++c) tmem.columns[c].allocated = true;
  const uint32_t address = tmem.base;
  std::memcpy(machine().shared(smem, 4), &address, 4);
}

void tmem_end_allocating(int ctas) {
  check_group(ctas);
  machine().meet("tcgen05.relinquish_alloc_permit", 0);
}

void tmem_free(int ctas, uint32_t address, uint32_t columns) {
  check_group(ctas);
  machine().meet("tcgen05.dealloc", address);
  if (machine().self().lane() != 0) return;
  TensorMemory& tmem = memory_of(*machine().self().cta);
  if (static_cast<int>(address) != tmem.base || static_cast<int>(columns) != tmem.allocated) {
    fail("tensor memory %#x x %u is freed, allocated was %#x x %d", address, columns, tmem.base,
         tmem.allocated);
  }
  for (Column& c : tmem.columns) {
    if (c.writers || c.metadata_readers) fail("tensor memory is freed while it is in use");
    if (c.unread) fail("tensor memory is freed before its sums were read");
    c.allocated = false;
  }
  tmem.allocated = 0;
}

void tmem_load(float* v, int count, uint32_t address) {
  before_tensor_use();
  const auto seen = machine().meet("tcgen05.ld", address);
  Thread& t = machine().self();
  for (uint64_t other : seen) {
    if (other != address) fail("lanes load tensor memory from different addresses");
  }
  if (address >> 16 != static_cast<uint32_t>(t.warp() % 4 * 32)) {
    fail("warp %d loads lanes from %u on", t.warp(), address >> 16);
  }
  TensorMemory& tmem = memory_of(*t.cta);
  for (int i = 0; i < count; ++i) {
    const int c = static_cast<int>(address & 0xFFFF) + i;
    Column& state = column(*t.cta, c);
    if (state.writers) fail("column %d is read while instructions write it", c);
    if (!state.written) fail("column %d is read and was never written", c);
    if (t.lane() == 31) state.unread &= ~(1u << (t.warp() % 4));
    std::memcpy(&v[i], &tmem.at(t.warp() % 4 * 32 + t.lane(), c), 4);
  }
  t.wants_fence_before = true;
}

void tmem_fence_before() { machine().self().wants_fence_before = false; }
void tmem_fence_after() { machine().self().wants_fence_after = false; }

// --- one thread --------------------------------------------------------------------------------

// 128 rows of 16 bytes to lanes 0..127, four columns.
void tmem_copy(int ctas, uint32_t address, uint64_t descriptor) {
  before_tensor_use();
  const Operand from = decode_operand(descriptor);
  std::vector<Granule*> reads;
  const std::vector<Cta*> all = group(ctas);
  if (address >> 16) fail("tcgen05.cp to lane %u", address >> 16);
  for (Cta* cta : all) {
    note_reads(*cta, from, kLanes, 16, reads);
    for (int c = 0; c < 4; ++c) {
      Column& state = column(*cta, static_cast<int>(address) + c);
      // PTX promises copy before multiplication, not the other way round.
      if (state.metadata_readers) fail("metadata is overwritten while an instruction reads it");
      if (state.unread) fail("metadata overwrites sums that were not read");
      ++state.writers;
    }
  }
  add_op(
      [all, from, address] {
        for (Cta* cta : all) {
          for (int row = 0; row < kLanes; ++row) {
            std::memcpy(&memory_of(*cta).at(row, static_cast<int>(address)),
                        &cta->smem.at(from.address(row, 0)), 16);
          }
          for (int c = 0; c < 4; ++c) {
            Column& state = memory_of(*cta).columns[address + c];
            --state.writers;
            state.written = true;
          }
        }
      },
      std::move(reads));
}

void mma(int ctas, bool sparse, uint32_t sums, uint64_t a, uint64_t b, uint32_t metadata,
         uint32_t instruction, bool accumulate, const uint32_t (&off)[2]) {
  before_tensor_use();
  const Instruction shape = decode_instruction(instruction, sparse, ctas);
  const Operand w = decode_operand(a), x = decode_operand(b);
  const int columns = sparse ? 64 : 32, x_rows = shape.tokens / ctas;
  std::vector<Granule*> reads;
  const std::vector<Cta*> all = group(ctas);
  if (sums >> 16) fail("sums begin at lane %u", sums >> 16);
  for (Cta* cta : all) {
    const uint32_t mask = off[cta->rank % 2];
    if (mask != 0 && mask != ~0u) fail("a mask of output lanes that is not all or nothing");
    note_reads(*cta, w, kLanes, 32, reads);
    note_reads(*cta, x, x_rows, columns, reads);
    for (int c = 0; sparse && c < 2; ++c) {
      Column& state = column(*cta, static_cast<int>(metadata) + c);
      if (!state.writers && !state.written) fail("metadata was never copied");
      ++state.metadata_readers;
    }
    if (mask) continue;
    for (int n = 0; n < shape.tokens; ++n) {
      Column& state = column(*cta, static_cast<int>(sums) + n);
      // PTX promises the order of two instructions for the same accumulator, shape and kind.
      if (state.writers && state.sparse_kind != sparse) {
        fail("sparse and dense instructions under way add to the same sums");
      }
      if (state.metadata_readers) fail("sums overwrite metadata in use");
      if (!accumulate && state.unread) fail("sums are overwritten before they were read");
      if (accumulate && !state.writers && state.unread != 15) fail("sums of no one are added to");
      ++state.writers;
      state.sparse_kind = sparse;
      state.unread = 15;
    }
  }
  const std::array<uint32_t, 2> masks = {off[0], off[1]};
  add_op(
      [=] {
        std::vector<float> operand_x(columns * shape.tokens);
        for (Cta* cta : all) {
          float* to = operand_x.data() + cta->rank % 2 * x_rows;
          read_columns(*cta, x, x_rows, columns, to, shape.tokens);
        }
        for (Cta* cta : all) {
          TensorMemory& tmem = memory_of(*cta);
          const bool adds = masks[cta->rank % 2] == 0;
          const auto values = read_operand(*cta, w, kLanes, 32);
          for (int row = 0; row < kLanes; ++row) {
            uint8_t places[32];
            if (sparse) {  // legal in every row, also in those that sit out
              uint8_t bytes[8];
              std::memcpy(bytes, &tmem.at(row, static_cast<int>(metadata)), 8);
              for (int i = 0; i < 16; ++i) decode_chunk(bytes, i, places + 2 * i);
            }
            if (!adds) continue;
            float* to = tmem.row(row, static_cast<int>(sums));
            if (!accumulate) std::fill_n(to, shape.tokens, 0.0f);
            multiply(to, values.data() + row * 32, sparse ? places : nullptr, 32, operand_x,
                     shape.tokens);
          }
          for (int n = 0; adds && n < shape.tokens; ++n) {
            Column& state = tmem.columns[sums + n];
            --state.writers;
            state.written = true;
          }
        }
        for (Cta* cta : all) {
          for (int c = 0; sparse && c < 2; ++c) {
            --memory_of(*cta).columns[metadata + c].metadata_readers;
          }
        }
      },
      std::move(reads));
}

void tensor_commit(int ctas, uint32_t barrier, uint16_t mask) {
  check_group(ctas);
  const uint32_t offset = Machine::offset_of(barrier);
  std::vector<Cta*> to;
  if (mask == 0 || ctas == 1) to = {&machine().owner(barrier)};  // the one form has no mask
  for (int rank = 0; ctas == 2 && rank < 16; ++rank) {
    if (mask >> rank & 1) to.push_back(cluster().ctas.at(rank));
  }
  for (Cta* cta : to) machine().barrier(*cta, offset);
  add_op([to, offset] {
    for (Cta* cta : to) machine().add_arrival(*cta, offset);
  });
}

}  // namespace model
