// SPDX-License-Identifier: Apache-2.0
// Which x86 configurations this CPU can run; the features are those of the flags in sources.cmake.
// Defined in dispatch.cpp, which is built for the baseline.
#pragma once

namespace spense::cpu {

bool has_avx2();
bool has_avx512();

}  // namespace spense::cpu
