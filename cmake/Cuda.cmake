# SPDX-License-Identifier: Apache-2.0
# Which GPU architectures are built, and the flags of each source file.
#
#   SPENSE_ARCHS         list such as 90a;100a, empty for a build without CUDA. find_cuda.py decides
#                        from the environment, and the cache keeps it until setup.py asks anew.
#   spense_cuda_sources  gives files to the kernel library, for the architectures named
#   spense_instances     makes one source file for each line of an instances.def
find_package(Python3 REQUIRED COMPONENTS Interpreter)

function(spense_find_cuda question variable)
  if(DEFINED CACHE{${variable}})
    return()
  endif()
  execute_process(
    COMMAND ${Python3_EXECUTABLE} ${SPENSE_ROOT}/cmake/find_cuda.py ${question}
    OUTPUT_VARIABLE answer
    ERROR_VARIABLE reason
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "spense_kernels: ${reason}")
  endif()
  set(${variable} "${answer}" CACHE STRING "answer of find_cuda.py ${question}" FORCE)
  set(${variable}_REASON "${reason}" CACHE STRING "why the answer is empty" FORCE)
endfunction()

spense_find_cuda(--archs SPENSE_ARCHS)
if(SPENSE_ARCHS)
  spense_find_cuda(--nvcc SPENSE_NVCC)
  # A wrapper script or a link would hide the toolkit's folders from CMake.
  execute_process(
    COMMAND ${SPENSE_NVCC} -v --dryrun -x cu -c /dev/null
    ERROR_VARIABLE dryrun OUTPUT_QUIET)
  if(dryrun MATCHES "#\\$ _HERE_=([^\n]+)")
    set(CMAKE_CUDA_COMPILER ${CMAKE_MATCH_1}/nvcc)
  else()
    set(CMAKE_CUDA_COMPILER ${SPENSE_NVCC})
  endif()
  get_filename_component(toolkit ${CMAKE_CUDA_COMPILER} DIRECTORY)
  get_filename_component(toolkit ${toolkit} DIRECTORY)
  if(NOT EXISTS ${toolkit}/lib64)  # NVIDIA's Python packages have lib, which nvcc does not search
    set(CMAKE_CUDA_FLAGS "-L${toolkit}/lib")
  endif()
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${SPENSE_ARCHS}")
else()
  message(STATUS "no CUDA build: ${SPENSE_ARCHS_REASON}")
endif()

# spense_cuda_sources(ARCHS 90a SOURCES a.cu b.cu): each file is compiled for those of ARCHS that
# are being built. An architecture that is built and has no source here is an error, not a gap.
function(spense_cuda_sources)
  cmake_parse_arguments(arg "" "" "ARCHS;SOURCES" ${ARGN})
  set(flags "")
  foreach(arch IN LISTS arg_ARCHS)
    if(arch IN_LIST SPENSE_ARCHS)
      list(APPEND flags "-gencode=arch=compute_${arch},code=sm_${arch}")
    endif()
  endforeach()
  if(NOT flags)
    return()
  endif()
  if(NOT arg_SOURCES)
    message(FATAL_ERROR "spense_kernels: asked to build for ${arg_ARCHS}, but it has no source")
  endif()
  set_property(SOURCE ${arg_SOURCES} APPEND PROPERTY COMPILE_OPTIONS ${flags})
  set_property(GLOBAL APPEND PROPERTY SPENSE_CUDA_LIBRARY_SOURCES ${arg_SOURCES})
endfunction()

# spense_instances(<variable> <instances.def> <instance.cu.in>): every line NAME(a, b, c) of the
# list becomes a source file in the build folder, from the template with @LINE@ = a, b, c,
# @NAME@ = a and, of names such as t128x64_..., @TOKENS@ = 64. Comments start with //.
function(spense_instances variable list template)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${list} ${template})
  get_filename_component(folder ${list} DIRECTORY)
  get_filename_component(folder ${folder} NAME)
  file(STRINGS ${list} lines REGEX "^[A-Z_0-9]+\\(.*\\)")
  set(files "")
  foreach(line IN LISTS lines)
    string(REGEX REPLACE "^[A-Z_0-9]+\\((.*)\\).*$" "\\1" LINE "${line}")
    string(REGEX REPLACE "^([^,]+).*$" "\\1" NAME "${LINE}")
    string(STRIP "${NAME}" NAME)
    string(REGEX REPLACE "^[a-z]+[0-9]+x([0-9]+)_.*$" "\\1" TOKENS "${NAME}")
    set(file ${CMAKE_BINARY_DIR}/generated/${folder}/${NAME}.cu)
    configure_file(${template} ${file} @ONLY)
    list(APPEND files ${file})
  endforeach()
  set(${variable} ${files} PARENT_SCOPE)
endfunction()
