# SPDX-License-Identifier: Apache-2.0
list(APPEND SPENSE_CUDA_HOST_SOURCES sm90/launch.cpp)
spense_instances(sm90_instances ${CMAKE_CURRENT_SOURCE_DIR}/heuristics/sm90_instances.def
                 ${CMAKE_CURRENT_SOURCE_DIR}/sm90/instance.cu.in)
spense_cuda_sources(ARCHS 90a SOURCES ${sm90_instances})
