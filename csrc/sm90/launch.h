// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/gemm.h"

namespace spense::sm90 {

void launch(const cuda::GemmPlan& plan, const cuda::GemmArgs& args, void* partials,
            uint32_t* counters, cuda::Stream stream);

}  // namespace spense::sm90
