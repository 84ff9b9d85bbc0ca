# SPDX-License-Identifier: Apache-2.0
list(APPEND SPENSE_CUDA_HOST_SOURCES sm100/launch.cpp)
spense_instances(sm100_instances ${CMAKE_CURRENT_SOURCE_DIR}/heuristics/sm100_instances.def
                 ${CMAKE_CURRENT_SOURCE_DIR}/sm100/instance.cu.in)
spense_cuda_sources(ARCHS 100a SOURCES ${sm100_instances})
# 0 leaves out the drain between sparse and dense instructions, for a trial (docs/sm100.md).
if(DEFINED ENV{SPENSE_SM100_DRAIN})
  set_property(SOURCE ${sm100_instances} APPEND PROPERTY COMPILE_DEFINITIONS
               SPENSE_SM100_DRAIN=$ENV{SPENSE_SM100_DRAIN})
endif()
