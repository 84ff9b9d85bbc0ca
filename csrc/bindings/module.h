// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace spense::bindings {

void add_cpu(pybind11::module_& m);
void add_format(pybind11::module_& m);
void add_sm90(pybind11::module_& m);
void add_sm100(pybind11::module_& m);

}  // namespace spense::bindings
