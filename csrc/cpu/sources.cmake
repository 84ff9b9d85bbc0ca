# SPDX-License-Identifier: Apache-2.0
# The CPU kernels and the flags of each instruction set. Nothing outside the two x86 lists may be
# built with more than the baseline: which of them runs is chosen at run time (dispatch.cpp).
set(SPENSE_CPU_SOURCES
    cpu/dispatch.cpp
    cpu/gemm_reference.cpp cpu/gemm_portable.cpp
    cpu/quantize_reference.cpp cpu/quantize_portable.cpp)
set(SPENSE_CPU_AVX2_SOURCES cpu/gemm_avx2.cpp cpu/quantize_avx2.cpp)
set(SPENSE_CPU_AVX512_SOURCES cpu/gemm_avx512.cpp cpu/quantize_avx512.cpp)

# Products and sums round as written, on every instruction set.
set(SPENSE_CPU_FLAGS -O3 -ffp-contract=off)
set(SPENSE_CPU_AVX2_FLAGS -mavx2 -mfma -mf16c)
set(SPENSE_CPU_AVX512_FLAGS -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vbmi2
    -mavx512bf16 -mfma -mf16c)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
  # GCC 12's own AVX-512 headers trip over these (GCC bug 105593).
  list(APPEND SPENSE_CPU_AVX512_FLAGS -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
