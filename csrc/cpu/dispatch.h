// SPDX-License-Identifier: Apache-2.0
// Which CPU configurations this machine can run, best first, and how to find one by name.
#pragma once

#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/quantize.h"

namespace spense::cpu {

// Available configurations, best first: of "avx512", "avx2", "portable", "reference".
const std::vector<const GemmConfig*>& gemm_configs();
const std::vector<const QuantizeConfig*>& quantize_configs();

// The best one when name is null or empty, the named one, or null when it is unknown or this CPU
// cannot run it.
const GemmConfig* find_gemm(const char* name);
const QuantizeConfig* find_quantize(const char* name);

// "avx512, avx2, portable, reference", for messages.
std::string config_names();

}  // namespace spense::cpu
