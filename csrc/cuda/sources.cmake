# SPDX-License-Identifier: Apache-2.0
# libspense_cuda. Host files compile once; kernels for the architectures named.
set(SPENSE_CUDA_HOST_SOURCES cuda/api.cpp cuda/gemm.cpp device/tensor_map.cpp)
spense_cuda_sources(ARCHS 90a 100a SOURCES cuda/quantize.cu cuda/pack.cu cuda/norm.cu
                    cuda/gated.cu)
if(90a IN_LIST SPENSE_ARCHS)
  include(sm90/sources.cmake)
endif()
if(100a IN_LIST SPENSE_ARCHS)
  include(sm100/sources.cmake)
endif()
