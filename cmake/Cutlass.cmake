# SPDX-License-Identifier: Apache-2.0
# spense::cutlass = the headers of the PyPI package nvidia-cutlass, pinned.
file(STRINGS ${SPENSE_ROOT}/cmake/requirements-cuda.txt pin REGEX "^nvidia-cutlass==")
string(REGEX REPLACE "^nvidia-cutlass==([0-9]+\\.[0-9]+\\.[0-9]+).*$" "\\1" SPENSE_CUTLASS_VERSION "${pin}")
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c
          "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
  OUTPUT_VARIABLE cutlass_library
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET
  RESULT_VARIABLE failed)
set(cutlass_include ${cutlass_library}/source/include)
if(failed OR NOT EXISTS ${cutlass_include}/cutlass/version.h)
  message(FATAL_ERROR "spense_kernels: the CUDA build reads CUTLASS headers from Python's packages: "
                      "pip install ${pin}")
endif()
set(found "")
foreach(part MAJOR MINOR PATCH)
  file(STRINGS ${cutlass_include}/cutlass/version.h line REGEX "#define CUTLASS_${part} ")
  string(REGEX MATCH "[0-9]+" number "${line}")
  list(APPEND found ${number})
endforeach()
list(JOIN found "." found)
if(NOT found VERSION_EQUAL SPENSE_CUTLASS_VERSION)
  message(FATAL_ERROR "spense_kernels: expected CUTLASS ${SPENSE_CUTLASS_VERSION}, got ${found} "
                      "in ${cutlass_include}")
endif()
add_library(spense_cutlass INTERFACE)
add_library(spense::cutlass ALIAS spense_cutlass)
target_include_directories(spense_cutlass SYSTEM INTERFACE ${cutlass_include})
message(STATUS "CUTLASS ${found}")
