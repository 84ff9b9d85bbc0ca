// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

namespace model {
namespace {
Machine* g_machine = nullptr;
constexpr size_t kStackBytes = 128 * 1024;
}  // namespace

Machine& machine() { return *g_machine; }
void set_machine(Machine* m) { g_machine = m; }

void fail(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  std::string what = text;
  if (g_machine && g_machine->current) {
    const Thread& t = *g_machine->current;
    what += " [CTA " + std::to_string(t.cta->index) + ", warp " + std::to_string(t.warp()) +
            ", lane " + std::to_string(t.lane()) + "]";
  }
  throw Failure{what};
}

// --- fibers ------------------------------------------------------------------------------------

void Machine::enter() {
  Machine& m = machine();
  Thread& t = *m.current;
  try {
    m.body();
  } catch (const Failure& failure) {
    if (m.failure.empty()) m.failure = failure.what;
  }
  t.done = true;
  --t.cta->live;
  if (m.failure.empty()) {
    try {
      if (t.cta->live == 0) m.check_left(*t.cta);
    } catch (const Failure& failure) {
      m.failure = failure.what;
    }
  }
  m.suspend();
}

// Switches without the system calls of swapcontext.
void Machine::go_on(Thread& t) {
  current = &t;
  if (_setjmp(home)) return;
  if (t.begun) _longjmp(t.place, 1);
  t.begun = true;
  setcontext(&t.context);
}

void Machine::suspend() {
  if (!_setjmp(self().place)) _longjmp(home, 1);
}

void Machine::block(const void* object, const char* waits_for, uint32_t number,
                    std::function<bool()> may_go_on) {
  if (may_go_on()) return;
  Thread& t = self();
  t.waits_for = waits_for;
  t.waits_number = number;
  t.may_go_on = std::move(may_go_on);
  waiting[object].push_back(&t);
  suspend();
}

void Machine::wake(const void* object) {
  const auto found = waiting.find(object);
  if (found == waiting.end()) return;
  std::vector<Thread*> still;
  for (Thread* t : found->second) (t->may_go_on() ? ready : still).push_back(t);
  found->second = std::move(still);
}

void Machine::add_thread(Cta& cta, int index) {
  auto t = std::make_unique<Thread>();
  t->cta = &cta;
  t->index = index;
  t->stack.reset(new char[kStackBytes]);
  getcontext(&t->context);
  t->context.uc_stack.ss_sp = t->stack.get();
  t->context.uc_stack.ss_size = kStackBytes;
  t->context.uc_link = nullptr;
  makecontext(&t->context, &Machine::enter, 0);
  ready.push_back(t.get());
  threads.push_back(std::move(t));
}

void Machine::run(const Launch& launch, std::function<void()> what) {
  body = std::move(what);
  failure.clear();
  cta_group = 0;
  ctas.clear(), clusters.clear(), threads.clear(), ready.clear(), waiting.clear(), copies.clear();
  for (int i = 0; i < launch.grid; ++i) {
    if (i % launch.cluster == 0) {
      clusters.push_back(std::make_unique<Cluster>());
      clusters.back()->threads = launch.cluster * launch.block;
    }
    auto cta = std::make_unique<Cta>();
    cta->cluster = clusters.back().get();
    cta->index = i;
    cta->rank = i % launch.cluster;
    cta->live = launch.block;
    cta->smem.assign(kSmemBase + launch.smem_bytes, 0xA5);
    cta->granules.resize((kSmemBase + launch.smem_bytes + kGranule - 1) / kGranule);
    cta->meetings.resize((launch.block + 31) / 32);
    cta->cluster->ctas.push_back(cta.get());
    ctas.push_back(std::move(cta));
  }
  for (auto& cta : ctas) {
    for (int i = 0; i < launch.block; ++i) add_thread(*cta, i);
  }
  size_t left = threads.size();
  while (left > 0 && failure.empty()) {
    step();
    left = 0;
    for (auto& cta : ctas) left += cta->live;
  }
  current = nullptr;
  if (!failure.empty()) throw Failure{failure};
}

void Machine::step() {
  current = nullptr;
  const bool async_first = pace == Pace::kEarly || (pace == Pace::kRandom && random() % 4 == 0);
  try {
    if ((async_first || ready.empty()) && run_async()) return;
  } catch (const Failure& f) {
    failure = f.what;
    return;
  }
  if (ready.empty()) {
    std::map<std::string, int> waiting;
    for (auto& t : threads) {
      if (!t->done) {
        ++waiting["CTA " + std::to_string(t->cta->index) + " warp " + std::to_string(t->warp()) +
                  ": " + t->waits_for + " " + std::to_string(t->waits_number)];
      }
    }
    failure = "deadlock:";
    for (const auto& [what, count] : waiting) failure += " {" + what + "}";
    return;
  }
  const size_t which = pace == Pace::kRandom ? random() % ready.size() : ready.size() - 1;
  Thread* t = ready[which];
  ready[which] = ready.back();
  ready.pop_back();
  go_on(*t);
}

bool Machine::run_async() {
  std::vector<std::deque<TensorOp>*> queues;
  for (auto& cluster : clusters) {
    for (auto& [issuer, queue] : cluster->tensor) {
      if (!queue.empty()) queues.push_back(&queue);
    }
  }
  const size_t total = copies.size() + queues.size();
  if (total == 0) return false;
  const size_t which = random() % total;
  if (which < copies.size()) {
    finish_copy(which);
  } else {
    TensorOp op = std::move(queues[which - copies.size()]->front());
    queues[which - copies.size()]->pop_front();
    for (Granule* g : op.reads) --g->readers;
    op.run();
  }
  return true;
}

void Machine::check_left(Cta& cta) {
  for (const Copy& copy : copies) {
    if (copy.to == &cta || copy.barrier_cta == &cta) {
      fail("CTA %d has left and a copy or a commit to it is under way", cta.index);
    }
  }
  for (auto& [issuer, queue] : cta.cluster->tensor) {
    if (!queue.empty()) fail("CTA %d has left and tensor instructions are under way", cta.index);
  }
}

// --- shared memory and barriers ----------------------------------------------------------------

Cta& Machine::owner(uint32_t address) {
  Cluster& cluster = *self().cta->cluster;
  const uint32_t rank = address >> 24;
  if (rank >= cluster.ctas.size()) fail("address %#x is in no CTA of the cluster", address);
  Cta& cta = *cluster.ctas[rank];
  if (cta.live == 0) fail("address %#x is in a CTA that has left", address);
  return cta;
}

uint8_t* Machine::shared(uint32_t address, int bytes) {
  Cta& cta = owner(address);
  const uint32_t offset = offset_of(address);
  if (offset < kSmemBase || offset + bytes > cta.smem.size()) {
    fail("%d bytes at %#x are outside the shared memory", bytes, address);
  }
  return cta.smem.data() + offset;
}

uint8_t* Machine::shared_for_write(uint32_t address, int bytes) {
  uint8_t* at = shared(address, bytes);
  for (int i = 0; i < bytes; i += kGranule) {
    if (granule(owner(address), offset_of(address) + i).readers) {
      fail("address %#x is overwritten while a store reads it", address);
    }
  }
  return at;
}

Granule& Machine::granule(Cta& cta, uint32_t offset) {
  if (offset < kSmemBase || offset / kGranule >= cta.granules.size()) {
    fail("offset %#x is outside the shared memory", offset);
  }
  return cta.granules[offset / kGranule];
}

Barrier& Machine::barrier(Cta& cta, uint32_t offset) {
  const auto found = cta.barriers.find(offset);
  if (found == cta.barriers.end()) fail("no barrier was initialised at offset %#x", offset);
  return found->second;
}

void Machine::arrive(Cta& cta, uint32_t offset, uint32_t count, int64_t expect, int64_t complete) {
  Barrier& b = barrier(cta, offset);
  if (count > b.pending) fail("more arrivals than barrier %#x expects in this phase", offset);
  b.pending -= count;
  b.bytes += expect - complete;
  if (b.pending == 0 && b.bytes == 0) {
    ++b.phase;
    b.pending = b.expected;
    wake(&b);
  }
}

void Machine::add_copy(uint32_t to, const std::vector<std::pair<uint32_t, const uint8_t*>>& pieces,
                       uint32_t barrier_address, bool may_be_passed) {
  Copy copy;
  copy.to = &owner(to);
  copy.barrier_cta = &owner(barrier_address);
  copy.barrier = offset_of(barrier_address);
  copy.bytes = static_cast<int64_t>(pieces.size()) * kGranule;
  barrier(*copy.barrier_cta, copy.barrier);
  for (const auto& [offset, from] : pieces) {
    Granule& g = granule(*copy.to, offset);
    if (g.copies) fail("two copies under way to offset %#x", offset);
    if (g.readers) fail("offset %#x is overwritten while an instruction reads it", offset);
    if (g.filled && !g.used && !may_be_passed) {
      fail("offset %#x is overwritten before it was read", offset);
    }
    ++g.copies;
    g.used = false;
    copy.granules.push_back(&g);
  }
  Cta* cta = copy.to;
  copy.move = [cta, pieces] {
    for (const auto& [offset, from] : pieces) {
      if (from) {
        std::copy(from, from + kGranule, cta->smem.data() + offset);
      } else {
        std::fill_n(cta->smem.data() + offset, kGranule, 0);
      }
    }
  };
  copies.push_back(std::move(copy));
}

void Machine::add_arrival(Cta& cta, uint32_t offset) {
  Copy arrival;
  arrival.to = arrival.barrier_cta = &cta;
  arrival.barrier = offset;
  arrival.arrivals = 1;
  copies.push_back(std::move(arrival));
}

void Machine::add_store(std::vector<Granule*> granules, std::function<void()> move) {
  Thread& t = self();
  if (t.store_groups.empty()) t.store_groups.push_back(std::make_shared<int>(0));
  Copy store;
  store.to = store.barrier_cta = t.cta;
  store.granules = std::move(granules);
  for (Granule* g : store.granules) ++g->readers;
  store.move = std::move(move);
  store.store_group = t.store_groups.back();
  ++*store.store_group;
  copies.push_back(std::move(store));
}

void Machine::finish_copy(size_t which) {
  Copy copy = std::move(copies[which]);
  copies[which] = std::move(copies.back());
  copies.pop_back();
  if (copy.move) copy.move();
  if (copy.store_group) {
    for (Granule* g : copy.granules) --g->readers;
    --*copy.store_group;
    wake(copy.store_group.get());
    return;
  }
  for (Granule* g : copy.granules) {
    --g->copies;
    g->filled = true;
  }
  arrive(*copy.barrier_cta, copy.barrier, copy.arrivals, 0, copy.bytes);
}

// --- global memory and warps -------------------------------------------------------------------

Region& Machine::global(const void* address, size_t bytes, bool write) {
  const auto* at = static_cast<const uint8_t*>(address);
  for (Region& r : regions) {
    if (at < r.base || at + bytes > r.base + r.bytes) continue;
    if (r.dependent && current && !self().after_grid_wait) {
      fail("%s is used before the kernel ahead is complete", r.name.c_str());
    }
    if (write && !r.writable) fail("%s is written", r.name.c_str());
    return r;
  }
  fail("%zu bytes at %p are in no array of the launch", bytes, address);
}

std::array<uint64_t, 32> Machine::meet(const char* what, uint64_t value) {
  Thread& t = self();
  Meeting& m = t.cta->meetings[t.warp()];
  if (m.count == 0) m.what = what;
  if (std::string(m.what) != what) fail("lanes of a warp meet in %s and %s", m.what, what);
  m.in[t.lane()] = value;
  const uint64_t mine = m.generation;
  if (++m.count == 32) {
    m.count = 0;
    ++m.generation;
    m.out = m.in;
    wake(&m);
  } else {
    block(&m, what, 0, [&m, mine] { return m.generation != mine; });
  }
  return m.out;
}

}  // namespace model
