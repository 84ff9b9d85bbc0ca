// SPDX-License-Identifier: Apache-2.0
// How long a launch is expected to take. Only the order of estimates matters: they choose.
#pragma once

#include "heuristics/gemm.h"

namespace spense::heuristics {

// Microseconds on an H100, for a weight whose tiles are alike, in a chain of launches.
double estimate_us(const GemmDesc& desc, const GemmChoice& choice, int slots);

}  // namespace spense::heuristics
