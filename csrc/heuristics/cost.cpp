// SPDX-License-Identifier: Apache-2.0
#include "heuristics/cost.h"

#include <algorithm>
#include <cmath>
#include <string_view>

namespace spense::heuristics {
namespace {

// Of one config: a CTA's time for a sparse unit, for a tile beside its units, and what putting cut
// tiles together adds to a launch.
struct Cost {
  std::string_view name;
  double unit_us, tile_us, fixup_us;
};
constexpr Cost kCosts[] = {
#define COST(name, unit_us, tile_us, fixup_us) {#name, unit_us, tile_us, fixup_us},
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
constexpr double kDramBytesPerUs = 3.283e6, kL2BytesPerUs = 11.799e6, kLaunchUs = 1.316;
constexpr double kStreamLaunch = 1.677;  // a stream-K launch against another
constexpr double kDenseUnit = 0.711;     // time of a dense unit against a sparse one
constexpr double kExponent = 2.324;      // how the limits add up: 1 would be one after another
constexpr double kTail = 0.849;          // how far a round of whole tiles by tickets counts as full
constexpr double kL2Bytes = 40e6, kReread = 0.329;  // cut tiles read again what L2 does not hold

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
  const double unit_us = c.unit_us / config.splits;
  const double tile_us = (sparse + (blocks - 2 * sparse) * kDenseUnit) * unit_us;

  const double w = static_cast<double>(desc.packed_bytes);
  const double x = static_cast<double>(desc.m * desc.k), y = static_cast<double>(desc.m * desc.n);
  double dram = (w + x + 2 * y) / kDramBytesPerUs;
  const double x_reads = std::ceil(row_tiles / config.row_tiles) * config.tokens * token_tiles *
                         static_cast<double>(desc.k);
  const double l2 = (w * token_tiles + x_reads / config.cluster_rows) / kL2BytesPerUs;
  const double rounds = tiles / slots;
  double work = 0, launch = kLaunchUs;
  if (choice.mode == Mode::kWhole) {
    const double full = std::ceil(rounds);
    const bool by_tickets = cluster_size(config) == 1 && rounds > 1;
    work = (by_tickets ? rounds + kTail * (full - rounds) : full) * (tile_us + c.tile_us);
  } else {
    work = rounds * tile_us + std::ceil(rounds) * c.tile_us + c.fixup_us;
    launch *= kStreamLaunch;
    dram += kReread * std::max(0.0, w + x - kL2Bytes) * (token_tiles - 1) / kDramBytesPerUs;
  }
  const auto power = [](double v) { return std::pow(v, kExponent); };
  return std::pow(power(work) + power(dram) + power(l2), 1 / kExponent) + launch;
}

}  // namespace spense::heuristics
