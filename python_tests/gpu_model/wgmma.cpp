// SPDX-License-Identifier: Apache-2.0
#include "wgmma.h"

#include <cstring>

#include "tensor_core.h"

namespace model {

struct WgmmaOp {
  bool sparse, accumulate;
  std::vector<float*> sums;
  uint64_t a, b;
  uint32_t metadata;
  std::vector<Granule*> reads;  // lane 0's
};

struct WgmmaState {
  std::vector<WgmmaOp> open;
  std::deque<std::vector<WgmmaOp>> groups;
};

namespace {

WgmmaState& state_of(Thread& t) {
  if (!t.wgmma) t.wgmma = std::make_shared<WgmmaState>();
  return *t.wgmma;
}

Operand decode(uint64_t d) {
  const auto field = [&](int from, int count) {
    return static_cast<uint32_t>(d >> from & ((uint64_t{1} << count) - 1));
  };
  if (field(14, 2) || field(30, 2) || field(46, 16)) fail("descriptor %#lx: reserved bits", d);
  if (field(62, 2) != 1) fail("descriptor %#lx: not the 128-byte swizzle", d);
  return {field(0, 14) << 4, field(16, 14) << 4, field(32, 14) << 4, true};
}

// The 16 rows of this warp in a 64-row operand.
Operand rows_of_warp(Operand a, int warp) {
  a.start += static_cast<uint32_t>(warp % 4 * 2) * a.stride;
  return a;
}

// One instruction for the 32 threads of a warp; ops[lane] is what each of them gave.
void execute(Cta& cta, int warp, const std::vector<const WgmmaOp*>& ops) {
  const WgmmaOp& op = *ops[0];
  for (const WgmmaOp* other : ops) {
    if (other->a != op.a || other->b != op.b || other->sparse != op.sparse ||
        other->accumulate != op.accumulate) {
      fail("lanes of a warp give wgmma different operands");
    }
  }
  const int tokens = static_cast<int>(op.sums.size()) * 2, columns = op.sparse ? 64 : 32;
  const auto values = read_operand(cta, rows_of_warp(decode(op.a), warp), 16, 32);
  std::vector<float> x(columns * tokens);
  read_columns(cta, decode(op.b), tokens, columns, x.data(), tokens);
  for (int row = 0; row < 16; ++row) {
    uint8_t places[32];
    if (op.sparse) {
      // Lane l holds row l / 4 + 8 * (l % 2), and of its eight bytes word l / 2 % 2.
      uint8_t bytes[8];
      for (int word = 0; word < 2; ++word) {
        const int lane = row % 8 * 4 + row / 8 + 2 * word;
        std::memcpy(bytes + 4 * word, &ops[lane]->metadata, 4);
      }
      for (int i = 0; i < 16; ++i) decode_chunk(bytes, i, places + 2 * i);
    }
    std::vector<float> sums(tokens, 0.0f);
    multiply(sums.data(), values.data() + row * 32, op.sparse ? places : nullptr, 32, x, tokens);
    for (int n = 0; n < tokens; ++n) {
      const int lane = row % 8 * 4 + n % 8 / 2;
      float& to = *ops[lane]->sums[n / 8 * 4 + row / 8 * 2 + n % 2];
      to = op.accumulate ? to + sums[n] : sums[n];
    }
  }
}

}  // namespace

void wgmma(bool sparse, const std::vector<float*>& sums, uint64_t a, uint64_t b, uint32_t metadata,
           bool accumulate) {
  Thread& t = machine().self();
  WgmmaOp op{sparse, accumulate, sums, a, b, metadata, {}};
  const int tokens = static_cast<int>(sums.size()) * 2;
  if (t.lane() == 0) {
    note_reads(*t.cta, rows_of_warp(decode(a), t.warp()), 16, 32, op.reads);
    note_reads(*t.cta, decode(b), tokens, sparse ? 64 : 32, op.reads, true);
  }
  state_of(t).open.push_back(std::move(op));
}

void wgmma_commit() {
  WgmmaState& s = state_of(machine().self());
  s.groups.push_back(std::move(s.open));
  s.open.clear();
}

void wgmma_wait(int pending) {
  Thread& t = machine().self();
  const auto all = machine().meet("wgmma.wait_group", reinterpret_cast<uint64_t>(&state_of(t)));
  if (t.lane() == 0) {
    while (static_cast<int>(state_of(t).groups.size()) > pending) {
      const size_t count = state_of(t).groups.front().size();
      for (size_t i = 0; i < count; ++i) {
        std::vector<const WgmmaOp*> ops;
        for (uint64_t other : all) {
          const auto& groups = reinterpret_cast<WgmmaState*>(other)->groups;
          if (groups.empty() || groups.front().size() != count)
            fail("lanes differ in wgmma groups");
          ops.push_back(&groups.front()[i]);
        }
        execute(*t.cta, t.warp(), ops);
        for (Granule* g : ops[0]->reads) --g->readers;
      }
      for (uint64_t other : all) reinterpret_cast<WgmmaState*>(other)->groups.pop_front();
    }
  }
  machine().meet("wgmma.wait_group done", 0);
}

}  // namespace model
