// SPDX-License-Identifier: Apache-2.0
// Loops that compilers vectorise for the baseline instruction set.
#include "cpu/neighbours_loops.h"
#include "cpu/quantize_loops.h"

namespace spense::cpu {

const QuantizeConfig kQuantizePortable = {"portable", quantize_always_available,
                                          quantize_rows<VectorLoops>, norm_rows<VectorLoops>,
                                          gated_rows<VectorLoops>};

}  // namespace spense::cpu
