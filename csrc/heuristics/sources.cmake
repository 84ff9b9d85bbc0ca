# SPDX-License-Identifier: Apache-2.0
set(SPENSE_HEURISTICS_SOURCES heuristics/cost.cpp heuristics/gemm.cpp
                              heuristics/sm100.cpp)
