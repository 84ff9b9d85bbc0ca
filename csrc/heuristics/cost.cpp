// SPDX-License-Identifier: Apache-2.0
#include "heuristics/cost.h"

#include <algorithm>
#include <cmath>
#include <string_view>

namespace spense::heuristics {
namespace {

// Of one config: a CTA's time for a sparse unit, for a dense one, for a tile beside its units, and
// what putting cut tiles together adds to a launch.
struct Cost {
  std::string_view name;
  double sparse_us, dense_us, tile_us, fixup_us;
};
constexpr Cost kCosts[] = {
#define COST(name, ...) {#name, __VA_ARGS__},
#include "heuristics/sm90_costs.def"
#undef COST
};

#define INSTANCE(name, ...) +1
constexpr size_t kInstances = 0
#include "heuristics/sm90_instances.def"
    ;
#undef INSTANCE
static_assert(std::size(kCosts) == kInstances, "every instance has its costs");

// Of the device, by the same fit: the rates that its limits seem to have in this formula.
constexpr double kDramBytesPerUs = 3.555e6, kL2BytesPerUs = 16.196e6, kLaunchUs = 0.237;
constexpr double kExponent = 1.777;  // how the limits add up: 1 would be one after another
constexpr double kL2Bytes = 40e6, kReread = 0.248;  // cut tiles read again what L2 does not hold
// Nanoseconds by which 32 rows of zeros in the last token tile, which the tensor map makes up,
// delay 128 columns: they take longer to copy than rows of x. Few hide behind the weight's copies,
// so that the delay grows with their square.
constexpr double kZeroRowsNs = 35.006;
constexpr double kSpread = 0.092;  // of the time: how much earlier than the last the first CTAs end
// For each CTA that a cluster waits for beside itself, where several clusters read a weight.
constexpr double kCompany = 0.023;

const Cost& cost(const GemmConfig& config) {
  return *std::find_if(std::begin(kCosts), std::end(kCosts),
                       [&](const Cost& c) { return c.name == config.name; });
}

}  // namespace

double estimate_us(const GemmDesc& desc, const GemmChoice& choice, int slots) {
  const GemmConfig& config = *choice.config;
  const Cost& c = cost(config);
  const double row_tiles = static_cast<double>(desc.row_tiles());
  const double token_tiles = std::ceil(static_cast<double>(desc.m) / config.tokens);
  const double tiles = std::ceil(row_tiles / group_tiles(config)) * token_tiles;
  const double blocks = static_cast<double>(desc.k_blocks());
  const double sparse = static_cast<double>(desc.sparse_units()) / row_tiles;
  const double zeros =
      (token_tiles * tile_tokens(config, desc.m) - static_cast<double>(desc.m)) / 32;
  const double units_us = sparse * c.sparse_us + (blocks - 2 * sparse) * c.dense_us +
                          zeros * zeros * blocks * kZeroRowsNs / 1000;

  const double w = static_cast<double>(desc.packed_bytes);
  const double x = static_cast<double>(desc.m * desc.k), y = static_cast<double>(desc.m * desc.n);
  double dram = (w + x + 2 * y) / kDramBytesPerUs;
  const double x_reads = std::ceil(row_tiles / config.row_tiles) * x;
  const double l2 = (w * token_tiles + x_reads / config.cluster_rows) / kL2BytesPerUs;
  const double rounds = tiles / slots, full = std::ceil(rounds);
  double work = 0;
  if (choice.mode == Mode::kWhole) {
    work = std::max(1.0, rounds) * (units_us + c.tile_us);
  } else {
    // One stream's pieces cross from one tile into the next.
    const int pieces =
        pieces_of_each(config.tokens, static_cast<int64_t>(tiles), desc.k_blocks(), slots);
    const double begun = full + (!pieces && full != rounds ? 1 : 0);
    work = (pieces ? 1.0 / pieces : rounds) * units_us + begun * c.tile_us;
    if (pieces != 1) work += c.fixup_us;
    dram += kReread * std::max(0.0, w + x - kL2Bytes) * (token_tiles - 1) / kDramBytesPerUs;
  }
  const auto power = [](double v) { return std::pow(v, kExponent); };
  double us = std::pow(power(work) + power(dram) + power(l2), 1 / kExponent);
  if (choice.mode == Mode::kWhole && rounds > 1) {
    // What the last round lacks to a full one, when memory is no limit any more. Tickets give the
    // last tiles to those that are ahead.
    const double ahead = config.cluster_rows == 1 ? kSpread * us : 0;
    us += std::max(0.0, (full - rounds) * (units_us + c.tile_us) - ahead);
  }
  if (token_tiles > 1) us *= 1 + kCompany * (config.cluster_rows - 1);
  return us + kLaunchUs;
}

}  // namespace spense::heuristics
