// SPDX-License-Identifier: Apache-2.0
// A machine that runs a kernel's own source on the host: threads as fibers, shared memory with a
// record of what is under way in it, mbarriers, copy engine, dependent launch. It stops at the
// first thing that hardware would not promise. tensor_core.h adds tensor memory and tcgen05,
// wgmma.h adds SM90's tensor cores. Written from the PTX documentation; no header of the kernels
// is included here.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

namespace model {

struct Failure {
  std::string what;
};
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- global memory -----------------------------------------------------------------------------

// An array that a kernel may touch. Bytes are counted where each must be written exactly once, or
// before it is read.
struct Region {
  std::string name;
  uint8_t* base;
  size_t bytes;
  bool dependent;  // made or used by the kernel ahead: not before the grid-dependency wait
  bool writable;
  std::vector<uint8_t> written;
};

// --- shared memory -----------------------------------------------------------------------------

inline constexpr int kGranule = 16;  // bytes that are tracked together
struct Granule {
  uint16_t copies = 0;   // copies under way to it
  uint16_t readers = 0;  // tensor instructions under way that read it
  bool filled = false;   // by a copy that is complete
  bool used = false;     // read since
};

struct Barrier {
  uint32_t expected = 0, pending = 0;
  int64_t bytes = 0;  // expected and not yet arrived; may be negative for a while
  uint32_t phase = 0;
};

struct Cta;
struct Cluster;

struct Thread {
  Cta* cta = nullptr;
  int index = 0;
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it was suspended
  bool begun = false;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::function<bool()> may_go_on;  // while it waits
  const char* waits_for = "";       // and for what
  uint32_t waits_number = 0;
  bool after_grid_wait = false;
  uint64_t cluster_waits = 0;
  std::shared_ptr<struct WgmmaState> wgmma;
  std::vector<std::shared_ptr<int>> store_groups;  // the last one is open
  bool wants_fence_after = false;   // it waited and has not fenced before using tensor memory
  bool wants_fence_before = false;  // it read tensor memory and has not fenced since
  int warp() const { return index / 32; }
  int lane() const { return index % 32; }
};

// Where the lanes of a warp meet.
struct Meeting {
  const char* what = nullptr;
  int count = 0;
  uint64_t generation = 0;
  std::array<uint64_t, 32> in{}, out{};
};

struct NamedBarrier {
  int count = 0;
  uint64_t generation = 0;
};

struct TensorMemory;  // tensor_core.h

struct Cta {
  Cluster* cluster = nullptr;
  int index = 0, rank = 0, live = 0;
  std::vector<uint8_t> smem;
  std::vector<Granule> granules;
  std::map<uint32_t, Barrier> barriers;  // by offset
  std::vector<Meeting> meetings;         // one a warp
  std::array<NamedBarrier, 16> named;
  std::shared_ptr<TensorMemory> tmem;
};

// What tensor cores were told and have not done, in order.
struct TensorOp {
  std::function<void()> run;
  std::vector<Granule*> reads;
};

struct Cluster {
  std::vector<Cta*> ctas;
  int arrived = 0, threads = 0;
  uint64_t generation = 0;
  std::map<int, std::deque<TensorOp>> tensor;  // by issuing thread
};

// A copy, the arrival of a commit, or a store from shared memory: complete in any order.
struct Copy {
  Cta* to = nullptr;
  Cta* barrier_cta = nullptr;
  uint32_t barrier = 0, arrivals = 0;
  int64_t bytes = 0;
  std::vector<Granule*> granules;
  std::function<void()> move;
  std::shared_ptr<int> store_group;  // of a store: how many of its group are under way
};

struct Launch {
  int grid = 1, block = 32, cluster = 1, smem_bytes = 0;
};

// How what is under way proceeds: as late as possible, as early as possible, or by chance.
enum class Pace { kLate, kEarly, kRandom };

struct Machine {
  std::mt19937_64 random{1};
  Pace pace = Pace::kRandom;
  std::vector<Region> regions;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Thread*> ready;
  std::unordered_map<const void*, std::vector<Thread*>> waiting;  // by object
  std::vector<Copy> copies;
  Thread* current = nullptr;
  jmp_buf home;
  std::string failure;
  int cta_group = 0;  // of the tensor instructions so far
  std::function<void()> body;

  // Runs body once in every thread; throws Failure.
  void run(const Launch& launch, std::function<void()> body);

  Thread& self() { return *current; }
  // Suspends the running thread until `may_go_on`, which is asked when `object` changes.
  void block(const void* object, const char* waits_for, uint32_t number,
             std::function<bool()> may_go_on);
  void wake(const void* object);

  // Shared memory of the cluster: address = rank << 24 | offset.
  Cta& owner(uint32_t address);
  static uint32_t offset_of(uint32_t address) { return address & 0xFFFFFF; }
  uint8_t* shared(uint32_t address, int bytes);
  // The same for a plain store, which nothing under way may read.
  uint8_t* shared_for_write(uint32_t address, int bytes);
  Granule& granule(Cta& cta, uint32_t offset);
  Barrier& barrier(Cta& cta, uint32_t offset);
  void arrive(Cta& cta, uint32_t offset, uint32_t count, int64_t expect, int64_t complete);
  void add_arrival(Cta& cta, uint32_t offset);
  void add_store(std::vector<Granule*> granules, std::function<void()> move);
  void add_copy(uint32_t to, const std::vector<std::pair<uint32_t, const uint8_t*>>& pieces,
                uint32_t barrier, bool may_be_passed = false);

  // Checks an access to global memory and returns its region.
  Region& global(const void* address, size_t bytes, bool write);

  // All lanes of the warp give a value and see all values.
  std::array<uint64_t, 32> meet(const char* what, uint64_t value);

 private:
  void add_thread(Cta& cta, int index);
  void go_on(Thread& t);
  void suspend();
  void step();
  bool run_async();
  void finish_copy(size_t which);
  void check_left(Cta& cta);
  static void enter();
};

Machine& machine();
void set_machine(Machine* m);

inline constexpr uint32_t kSmemBase = 1024;  // where the dynamic shared memory begins

}  // namespace model
