// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/gemm_args.h"
#include "device/stream.h"
#include "device/tensor_map.h"
#include "heuristics/sm100.h"

namespace spense::sm100 {

// How the kernels of a config read x, and pairs of CTAs the tile stream: in boxes of a unit.
cuda::ByteMatrix x_matrix(const heuristics::sm100::Config& config, const GemmArgs& args);
cuda::ByteMatrix w_matrix(const GemmArgs& args, int unit_bytes);

// Clusters of a config that the current device, number `device`, holds beside one another for one
// launch.
int cluster_slots(const heuristics::sm100::Config& config, int device);

void launch(const heuristics::sm100::Config& config, const heuristics::ScheduleParams& schedule,
            const GemmArgs& args, void* partials, uint32_t* counters, cuda::Stream stream);

}  // namespace spense::sm100
