// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace spense::cuda {

using Stream = void*;  // a cudaStream_t, for callers that see no CUDA header

}  // namespace spense::cuda
