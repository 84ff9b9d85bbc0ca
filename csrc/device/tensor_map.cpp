// SPDX-License-Identifier: Apache-2.0
#include "device/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "device/check.h"

namespace spense::cuda {
namespace {

// Through the runtime, so that nothing links the driver's library.
auto encode_function() {
  static const auto function = [] {
    constexpr unsigned kSince = 12000;
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    SPENSE_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, kSince,
                                                 cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess || !entry) {
      throw std::runtime_error("spense: the driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return function;
}

}  // namespace

CUtensorMap tensor_map(const ByteMatrix& matrix) {
  constexpr cuuint32_t kBoxColumns = 128;
  CUtensorMap map;
  const cuuint64_t size[] = {static_cast<cuuint64_t>(matrix.columns),
                             static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t stride[] = {static_cast<cuuint64_t>(matrix.stride)};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(matrix.box_rows)};
  const cuuint32_t step[] = {1, 1};
  const CUresult code =
      encode_function()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix.data),
                        size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        matrix.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS) {
    throw std::runtime_error("spense: cuTensorMapEncodeTiled: error " + std::to_string(code) +
                             " for " + std::to_string(matrix.rows) + " x " +
                             std::to_string(matrix.columns) + " bytes, stride " +
                             std::to_string(matrix.stride));
  }
  return map;
}

}  // namespace spense::cuda
