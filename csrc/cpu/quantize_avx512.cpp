// SPDX-License-Identifier: Apache-2.0
// The loops of quantize_loops.h, built for AVX-512.
#include "cpu/cpu_features.h"
#include "cpu/neighbours_loops.h"
#include "cpu/quantize_loops.h"

namespace spense::cpu {

const QuantizeConfig kQuantizeAvx512 = {"avx512", has_avx512, quantize_rows<VectorLoops>,
                                        norm_rows<VectorLoops>, gated_rows<VectorLoops>};

}  // namespace spense::cpu
