// SPDX-License-Identifier: Apache-2.0
// _C.cpu: which configurations this machine can run.
#include <stdexcept>

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

FloatType float_type(const std::string& name) {
  for (const FloatType type : {FloatType::kBFloat16, FloatType::kFloat16, FloatType::kFloat32}) {
    if (name == name_of(type)) return type;
  }
  throw std::invalid_argument("quantize: dtype: expected bfloat16, float16 or float32, got " +
                              name);
}

// The op quantize_fp8 takes the best configuration; tests compare them all. Addresses come from
// Tensor.data_ptr() of contiguous tensors, 0 for no gather.
void quantize(const std::string& config, int64_t m, int64_t k, const std::string& dtype,
              uintptr_t x, uintptr_t gather, uintptr_t y, int64_t y_stride, uintptr_t scale) {
  const cpu::QuantizeConfig* chosen = cpu::find_quantize(config.c_str());
  if (!chosen) throw std::invalid_argument("quantize: config: not available: " + config);
  cpu::QuantizeArgs args;
  args.m = m;
  args.k = args.x_stride = k;
  args.x = reinterpret_cast<const void*>(x);
  args.in = float_type(dtype);
  args.gather = reinterpret_cast<const int32_t*>(gather);
  args.y = reinterpret_cast<uint8_t*>(y);
  args.y_stride = y_stride;
  args.scale = reinterpret_cast<float*>(scale);
  chosen->run(args, 0, m);
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
  m.def("quantize", &quantize, py::arg("config"), py::arg("m"), py::arg("k"), py::arg("dtype"),
        py::arg("x"), py::arg("gather"), py::arg("y"), py::arg("y_stride"), py::arg("scale"),
        "quantize_fp8 with a named configuration, on addresses. Checks nothing: for tests.");
}

}  // namespace spense::bindings
