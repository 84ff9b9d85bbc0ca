# SPDX-License-Identifier: Apache-2.0
list(APPEND SPENSE_CUDA_HOST_SOURCES sm100/launch.cpp)
spense_instances(sm100_instances ${CMAKE_CURRENT_SOURCE_DIR}/heuristics/sm100_instances.def
                 ${CMAKE_CURRENT_SOURCE_DIR}/sm100/instance.cu.in)
spense_cuda_sources(ARCHS 100a SOURCES ${sm100_instances})
