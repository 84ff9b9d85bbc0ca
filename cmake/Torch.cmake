# SPDX-License-Identifier: Apache-2.0
# spense::torch = the stable-ABI headers and libtorch_cpu of the torch in this Python.
# find_package(Torch) is not used: it demands a CUDA toolkit wherever torch was built with one.
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c
          "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
  OUTPUT_VARIABLE SPENSE_TORCH_DIR
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "spense_kernels: ${Python3_EXECUTABLE} has no torch (>= 2.11 is needed)")
endif()
file(STRINGS ${SPENSE_TORCH_DIR}/version.py line REGEX "^__version__ = ")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" SPENSE_TORCH_VERSION "${line}")
if(SPENSE_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "spense_kernels: expected torch >= 2.11, got ${SPENSE_TORCH_VERSION}")
endif()

add_library(spense_torch INTERFACE)
add_library(spense::torch ALIAS spense_torch)
target_include_directories(spense_torch SYSTEM INTERFACE ${SPENSE_TORCH_DIR}/include)
# The oldest torch that a build must run on; without it the headers take their own version.
target_compile_definitions(spense_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_link_libraries(spense_torch INTERFACE ${SPENSE_TORCH_DIR}/lib/libtorch_cpu.so)
# libtorch_cpu's own dependencies are found by torch when it loads, not by this link.
target_link_options(spense_torch INTERFACE LINKER:--unresolved-symbols=ignore-in-shared-libs)
message(STATUS "torch ${SPENSE_TORCH_VERSION}, stable ABI for >= 2.11")
