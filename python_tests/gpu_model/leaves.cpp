// SPDX-License-Identifier: Apache-2.0
// The instructions behind shim/device/ptx.cuh and tcgen05.cuh.
#include <cstring>

#include "device/ptx.cuh"
#include "device/tcgen05.cuh"
#include "device/tensor_map.h"

namespace model {

void sync_threads(int id, int count) {
  Thread& t = machine().self();
  if (t.wants_fence_before) fail("no tcgen05.fence::before_thread_sync since a load");
  NamedBarrier& b = t.cta->named[id];
  const uint64_t mine = b.generation;
  const int all = count ? count : static_cast<int>(t.cta->meetings.size()) * 32;
  if (++b.count == all) {
    b.count = 0;
    ++b.generation;
    machine().wake(&b);
  } else {
    machine().block(&b, "bar.sync", static_cast<uint32_t>(id),
                    [&b, mine] { return b.generation != mine; });
  }
  t.wants_fence_after = true;
}

}  // namespace model

namespace spense::cuda {

CUtensorMap_st tensor_map(const ByteMatrix& matrix) {
  if (reinterpret_cast<uintptr_t>(matrix.data) % 16 || matrix.stride % 16) {
    model::fail("a tensor map of a matrix that is not aligned");
  }
  if (matrix.box_rows < 1 || matrix.box_rows > 256)
    model::fail("a box of %d rows", matrix.box_rows);
  return {static_cast<const uint8_t*>(matrix.data),
          matrix.rows,
          matrix.columns,
          matrix.stride,
          matrix.box_rows,
          matrix.swizzle};
}

}  // namespace spense::cuda

namespace spense::ptx {
namespace {

using model::fail;
using model::Machine;

// A barrier of this CTA, as instructions of the CTA's own shared memory take it.
uint32_t own(uint32_t barrier) {
  if (static_cast<int>(barrier >> 24) != machine().self().cta->rank) {
    fail("address %#x is not in the CTA's own shared memory", barrier);
  }
  if (barrier % 8) fail("a barrier at %#x", barrier);
  return Machine::offset_of(barrier);
}

void before_signal() {
  if (machine().self().wants_fence_before) {
    fail("no tcgen05.fence::before_thread_sync between a load and an arrival");
  }
}

using Pieces = std::vector<std::pair<uint32_t, const uint8_t*>>;

// A box of 128 bytes a row, row by row; the swizzle exchanges the 16-byte pieces of a row.
Pieces box(uint32_t smem, const void* map_address, int column, int row, bool reads) {
  const auto& map = *static_cast<const CUtensorMap*>(map_address);
  constexpr int kRow = 128;
  if (!map.data) fail("a tensor map that was not made");
  if (smem % (map.swizzle ? 1024 : kRow)) fail("a box at %#x", smem);
  Pieces pieces;
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < kRow; c += model::kGranule) {
      uint32_t to = Machine::offset_of(smem) + r * kRow + c;
      if (map.swizzle) to ^= to >> 3 & 0x70;
      const bool inside = row + r < map.rows && column + c + model::kGranule <= map.columns;
      const bool cut = row + r < map.rows && column + c < map.columns && !inside;
      if (row < 0 || column < 0) fail("a box at column %d, row %d", column, row);
      const uint8_t* from = map.data + (row + r) * map.stride + column + c;
      if (cut) {  // the last columns are in part outside: those bytes are zero
        static std::vector<std::unique_ptr<uint8_t[]>> edges;
        edges.push_back(std::make_unique<uint8_t[]>(model::kGranule));
        std::memcpy(edges.back().get(), from, map.columns - column - c);
        from = edges.back().get();
      } else if (inside && reads) {
        machine().global(from, model::kGranule, false);
      }
      pieces.emplace_back(to, inside || cut ? from : nullptr);
    }
  }
  return pieces;
}

}  // namespace

void barrier_init(uint32_t barrier, uint32_t arrivals) {
  machine().shared(barrier, 8);
  model::Barrier b;
  b.expected = b.pending = arrivals;
  if (!machine().self().cta->barriers.emplace(own(barrier), b).second) {
    fail("barrier %#x is initialised twice", barrier);
  }
}

void barrier_arrive(uint32_t barrier) {
  before_signal();
  machine().arrive(*machine().self().cta, own(barrier), 1, 0, 0);
}

void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  before_signal();
  machine().arrive(*machine().self().cta, own(barrier), 1, bytes, 0);
}

void barrier_arrive_remote(uint32_t barrier, uint32_t rank) {
  before_signal();
  const uint32_t remote = remote_smem(barrier, rank);
  machine().arrive(machine().owner(remote), Machine::offset_of(remote), 1, 0, 0);
}

void barrier_wait(uint32_t barrier, uint32_t parity) {
  if (parity > 1) fail("parity %u", parity);
  model::Barrier& b = machine().barrier(*machine().self().cta, own(barrier));
  machine().block(&b, parity ? "parity 1 of barrier" : "parity 0 of barrier", own(barrier),
                  [&b, parity] { return (b.phase & 1) != parity; });
  machine().self().wants_fence_after = true;
}

void cluster_arrive() {
  before_signal();
  model::Cluster& c = *machine().self().cta->cluster;
  if (++c.arrived == c.threads) {
    c.arrived = 0;
    ++c.generation;
    machine().wake(&c);
  }
}

// A thread waits right after it arrived, so that the generation it waits for is known.
void cluster_wait() {
  model::Thread& t = machine().self();
  model::Cluster& c = *t.cta->cluster;
  const uint64_t target = ++t.cluster_waits;
  machine().block(&c, "the cluster", 0, [&c, target] { return c.generation >= target; });
  t.wants_fence_after = true;
}

uint32_t remote_smem(uint32_t smem, uint32_t rank) {
  if (rank >= machine().self().cta->cluster->ctas.size()) fail("rank %u of a cluster", rank);
  return Machine::offset_of(smem) | rank << 24;
}

void store_remote(uint32_t address, uint32_t v, uint32_t barrier, uint32_t rank) {
  std::memcpy(machine().shared_for_write(remote_smem(address, rank), 4), &v, 4);
  const uint32_t remote = remote_smem(barrier, rank);
  machine().arrive(machine().owner(remote), Machine::offset_of(remote), 0, 0, 4);
}

void bulk_copy(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier, uint64_t) {
  if (smem % 16 || bytes % 16 || bytes == 0 || reinterpret_cast<uintptr_t>(global) % 16) {
    fail("a bulk copy of %u bytes to %#x is not aligned", bytes, smem);
  }
  own(barrier);
  machine().global(global, bytes, false);
  Pieces pieces;
  for (uint32_t i = 0; i < bytes; i += model::kGranule) {
    pieces.emplace_back(Machine::offset_of(smem) + i, static_cast<const uint8_t*>(global) + i);
  }
  machine().add_copy(smem, pieces, barrier);
}

void tensor_copy_2d(uint32_t smem, const void* map, int column, int row, uint32_t barrier,
                    uint64_t) {
  own(barrier);
  machine().add_copy(smem, box(smem, map, column, row, true), barrier);
}

void tensor_copy_2d_pair(uint32_t smem, const void* map, int column, int row, uint32_t barrier,
                         uint64_t) {
  if (static_cast<int>(smem >> 24) != machine().self().cta->rank) fail("a copy to the other CTA");
  machine().add_copy(smem, box(smem, map, column, row, true), barrier);
}

void tensor_copy_2d_pair_multicast(uint32_t smem, const void* map, int column, int row,
                                   uint32_t barrier, uint16_t mask, uint64_t) {
  const Pieces pieces = box(smem, map, column, row, true);
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (!(mask >> rank & 1)) continue;
    // Counted in the pair of the target, in the CTA of the barrier's parity. A pair may pass over
    // a block that the other one needs.
    const uint32_t counted = (rank & ~1u) | (barrier >> 24 & 1);
    machine().add_copy(remote_smem(smem, rank), pieces, remote_smem(barrier, counted), true);
  }
}

void tensor_copy_2d_multicast(uint32_t smem, const void* map, int column, int row, uint32_t barrier,
                              uint16_t mask, uint64_t) {
  const Pieces pieces = box(smem, map, column, row, true);
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (mask >> rank & 1) {
      machine().add_copy(remote_smem(smem, rank), pieces, remote_smem(barrier, rank));
    }
  }
}

uint4 load_shared_v4(uint32_t address) {
  if (address % 16) fail("a 16-byte load at %#x", address);
  uint32_t v[4];
  std::memcpy(v, machine().shared(address, 16), 16);
  machine().granule(machine().owner(address), Machine::offset_of(address)).used = true;
  return {v[0], v[1], v[2], v[3]};
}

uint32_t load_shared(uint32_t address) {
  uint32_t v;
  std::memcpy(&v, machine().shared(address, 4), 4);
  return v;
}

void store_shared(uint32_t address, uint32_t v) {
  std::memcpy(machine().shared_for_write(address, 4), &v, 4);
}

void store_shared_v4(uint32_t address, uint4 v) {
  const uint32_t words[] = {v.x, v.y, v.z, v.w};
  std::memcpy(machine().shared_for_write(address, 16), words, 16);
}

uint32_t atomic_ticket(uint32_t* counter, uint32_t last) {
  machine().global(counter, 4, true);
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

uint32_t atomic_add(uint32_t* to, uint32_t v) {
  machine().global(to, 4, true);
  const uint32_t before = *to;
  *to = before + v;
  return before;
}

uint32_t load_relaxed(const uint32_t* from) {
  machine().global(from, 4, false);
  return *from;
}

void store_relaxed(uint32_t* to, uint32_t v) {
  machine().global(to, 4, true);
  *to = v;
}

// Lane l gives the place of column l % 8 of matrix l / 8; every register holds row lane / 4,
// columns 2 * (lane % 4) and the next of one matrix.
void store_matrices(const std::vector<uint32_t>& registers, uint32_t to) {
  const auto places = machine().meet("stmatrix", to);
  std::vector<std::array<uint64_t, 32>> all;
  for (uint32_t v : registers) all.push_back(machine().meet("stmatrix value", v));
  if (machine().self().lane() != 0) return;
  for (size_t matrix = 0; matrix < registers.size(); ++matrix) {
    for (int column = 0; column < 8; ++column) {
      const auto at = static_cast<uint32_t>(places[matrix * 8 + column]);
      if (at % 16) fail("stmatrix to %#x", at);
      uint16_t rows[8];
      for (int row = 0; row < 8; ++row) {
        rows[row] = static_cast<uint16_t>(all[matrix][row * 4 + column / 2] >> (column % 2 * 16));
      }
      std::memcpy(machine().shared_for_write(at, 16), rows, 16);
    }
  }
}
void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrices({a, b, c, d}, to);
  machine().meet("stmatrix done", 0);
}
void store_matrices(uint32_t to, uint32_t a, uint32_t b) {
  store_matrices({a, b}, to);
  machine().meet("stmatrix done", 0);
}

// A box of rows of 128 bytes with the 128-byte swizzle; what lies outside y is left out.
void tensor_store_2d(const void* map_address, int column, int row, uint32_t smem) {
  const auto& map = *static_cast<const CUtensorMap*>(map_address);
  if (!map.data || !map.swizzle || smem % 1024) fail("a tensor store from %#x", smem);
  model::Cta& cta = *machine().self().cta;
  std::vector<model::Granule*> granules;
  std::vector<std::pair<uint32_t, uint8_t*>> pieces;
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < 128; c += model::kGranule) {
      const uint32_t linear = Machine::offset_of(smem) + r * 128 + c;
      const uint32_t from = linear ^ (linear >> 3 & 0x70);
      granules.push_back(&machine().granule(cta, from));
      if (row + r >= map.rows || column + c >= map.columns) continue;
      if (column + c + model::kGranule > map.columns) fail("y ends inside 16 bytes");
      uint8_t* to = const_cast<uint8_t*>(map.data) + (row + r) * map.stride + column + c;
      machine().global(to, model::kGranule, true);
      pieces.emplace_back(from, to);
    }
  }
  machine().add_store(std::move(granules), [&cta, pieces] {
    for (const auto& [from, to] : pieces) {
      model::note_store(to, model::kGranule);
      std::memcpy(to, cta.smem.data() + from, model::kGranule);
    }
  });
}

void store_commit() {
  auto& groups = machine().self().store_groups;
  groups.push_back(std::make_shared<int>(0));
}

void store_wait(int pending) {
  const auto groups = machine().self().store_groups;  // the last one is open
  for (int i = 0; i + 1 + pending < static_cast<int>(groups.size()); ++i) {
    const auto& group = groups[i];
    machine().block(group.get(), "stores of group", static_cast<uint32_t>(i),
                    [group] { return *group == 0; });
  }
}

// Row lane / 4, columns 2 * (lane % 4) and the next of an 8x8 matrix of 16-bit elements.
uint32_t transpose_8x8(uint32_t fragment) {
  const auto all = machine().meet("movmatrix", fragment);
  const int row = machine().self().lane() / 4, column = machine().self().lane() % 4 * 2;
  const auto element = [&](int r, int c) {
    return static_cast<uint32_t>(all[r * 4 + c / 2] >> (c % 2 * 16) & 0xFFFF);
  };
  return element(column, row) | element(column + 1, row) << 16;
}

}  // namespace spense::ptx
