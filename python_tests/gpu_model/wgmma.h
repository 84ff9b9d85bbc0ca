// SPDX-License-Identifier: Apache-2.0
// wgmma as the SM90 kernels use it: operands in shared memory, sums in registers, metadata in one
// register a lane. What is issued is done when the warp waits for it, as late as it may be.
#pragma once

#include <cstdint>
#include <vector>

namespace model {

// sums[4 j + 2 h + t] = row lane / 4 + 8 h of the warp's 16, column 8 j + lane % 4 * 2 + t.
void wgmma(bool sparse, const std::vector<float*>& sums, uint64_t a, uint64_t b, uint32_t metadata,
           bool accumulate);
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace model
