// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/gemm_args.h"
#include "device/stream.h"
#include "device/tensor_map.h"
#include "heuristics/gemm.h"

namespace spense::sm90 {

// How the kernels of a config read x.
cuda::ByteMatrix x_matrix(const heuristics::GemmConfig& config, const GemmArgs& args);

// Clusters of each config that the current device holds at a time; asked once a device.
const heuristics::MaxClusters& max_clusters(int device);

void launch(const heuristics::GemmChoice& choice, const heuristics::ScheduleParams& schedule,
            const GemmArgs& args, void* partials, uint32_t* counters, cuda::Stream stream);

}  // namespace spense::sm90
