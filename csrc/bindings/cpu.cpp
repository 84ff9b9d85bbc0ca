// SPDX-License-Identifier: Apache-2.0
// _C.cpu: which configurations this machine can run.
#include "bindings/module.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace spense::bindings {
namespace {

template <typename Config>
std::vector<std::string> names(const std::vector<const Config*>& configs) {
  std::vector<std::string> found;
  for (const Config* config : configs) found.emplace_back(config->name);
  return found;
}

}  // namespace

void add_cpu(py::module_& parent) {
  py::module_ m = parent.def_submodule("cpu", "CPU kernels (csrc/cpu/dispatch.h).");
  m.def(
      "gemm_configs", [] { return names(cpu::gemm_configs()); },
      "Configurations of hybrid_gemm that run here, best first.");
  m.def(
      "quantize_configs", [] { return names(cpu::quantize_configs()); },
      "Configurations of quantize_fp8 that run here, best first.");
}

}  // namespace spense::bindings
