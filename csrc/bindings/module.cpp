// SPDX-License-Identifier: Apache-2.0
// spense_kernels._C: what kernels assume, as plain functions that tests and tools can call without
// a GPU. No forward pass imports it.
#include "bindings/module.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host facts of the kernels: layouts, sizes, configurations. For tests and tools.";
  spense::bindings::add_cpu(m);
  spense::bindings::add_format(m);
  spense::bindings::add_sm90(m);
  spense::bindings::add_sm100(m);
}
