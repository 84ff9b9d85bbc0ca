// SPDX-License-Identifier: Apache-2.0
// Hybrid GEMMs on small integers: operands packed by the product's packer, and the expected bytes
// of y from the unpacked ones. Products and sums are exact in float32.
#pragma once

#include <string>
#include <vector>

#include "core/gemm_args.h"
#include "machine.h"

namespace model {

struct Case {
  std::string name;
  int64_t m, n, k;
  std::vector<int64_t> dense_width;  // of each tile of 128 rows
  int multiprocessors;
  spense::OutType out = spense::OutType::kBFloat16;
  bool bias = true, one_scale = false;
};

class Problem {
 public:
  Problem(const Case& c, uint64_t seed);

  spense::GemmArgs args();
  // The launch's arrays, as the machine checks them. Resets y, partials and counters.
  std::vector<Region> regions(int64_t partial_bytes, int64_t counters);
  void* partials() { return partials_.data(); }
  uint32_t* counters() { return counters_.data(); }
  // The first difference between y and what is expected, or what else was left undone; or nothing.
  std::string check(const std::vector<Region>& after) const;

 private:
  static constexpr size_t kGuard = 1 << 16;  // bytes on either side of y that nobody may touch
  void make_weights(uint64_t seed);
  void make_expected();

  Case c_;
  int64_t stride_;
  std::vector<int8_t> w_, x_;  // [n, k], [m, k] in gather order
  std::vector<uint8_t> packed_, x_bytes_, y_, expected_;
  std::vector<int32_t> tiles_;
  std::vector<float> x_scale_, w_scale_, bias_;
  std::vector<uint8_t> partials_;
  std::vector<uint32_t> counters_;
};

// What every configuration is run on; `tokens` and `ctas` are those of the configuration.
std::vector<Case> cases(int tokens, int ctas);

}  // namespace model
