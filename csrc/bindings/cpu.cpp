// SPDX-License-Identifier: Apache-2.0
// _C.cpu: which configurations this machine can run.
#include <stdexcept>

#include "bindings/module.h"
#include "cpu/dispatch.h"
#include "cpu/neighbours.h"

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

const cpu::QuantizeConfig& quantize_config(const std::string& name) {
  const cpu::QuantizeConfig* chosen = cpu::find_quantize(name.c_str());
  if (!chosen) throw std::invalid_argument("quantize: config: not available: " + name);
  return *chosen;
}

// Contiguous rows and where their quantised form goes; addresses as of Tensor.data_ptr(), 0 for
// no gather.
struct Rows {
  int64_t m, k;
  std::string dtype;
  uintptr_t x, gather, y;
  int64_t y_stride;
  uintptr_t scale;

  cpu::QuantizeArgs args() const {
    cpu::QuantizeArgs args;
    args.m = m;
    args.k = args.x_stride = k;
    args.x = reinterpret_cast<const void*>(x);
    args.in = float_type(dtype);
    args.gather = reinterpret_cast<const int32_t*>(gather);
    args.y = reinterpret_cast<uint8_t*>(y);
    args.y_stride = y_stride;
    args.scale = reinterpret_cast<float*>(scale);
    return args;
  }
};

// The ops take the best configuration; tests compare them all.
void quantize(const std::string& config, const Rows& rows) {
  quantize_config(config).run(rows.args(), 0, rows.m);
}

void norm(const std::string& config, const Rows& rows, uintptr_t residual, uintptr_t sum,
          uintptr_t weight, float eps) {
  cpu::NormArgs args;
  args.rows = rows.args();
  args.residual = reinterpret_cast<const void*>(residual);
  args.residual_stride = rows.k;
  args.sum = reinterpret_cast<void*>(sum);
  args.weight = reinterpret_cast<const float*>(weight);
  args.eps = eps;
  quantize_config(config).run_norm(args, 0, rows.m);
}

void gated(const std::string& config, const Rows& rows, uintptr_t up, int activation) {
  cpu::GatedArgs args;
  args.rows = rows.args();
  args.up = reinterpret_cast<const void*>(up);
  args.up_stride = rows.k;
  args.activation = static_cast<Activation>(activation);
  quantize_config(config).run_gated(args, 0, rows.m);
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
  py::class_<Rows>(m, "Rows", "Addresses of rows and of their quantised form.")
      .def(py::init<int64_t, int64_t, std::string, uintptr_t, uintptr_t, uintptr_t, int64_t,
                    uintptr_t>(),
           py::arg("m"), py::arg("k"), py::arg("dtype"), py::arg("x"), py::arg("gather"),
           py::arg("y"), py::arg("y_stride"), py::arg("scale"));
  m.def("quantize", &quantize, py::arg("config"), py::arg("rows"),
        "quantize_fp8 with a named configuration, on addresses. Checks nothing: for tests.");
  m.def("norm", &norm, py::arg("config"), py::arg("rows"), py::arg("residual"), py::arg("sum"),
        py::arg("weight"), py::arg("eps"),
        "(add_)rms_norm_quantize; residual 0 for none, weight float32 and complete.");
  m.def("gated", &gated, py::arg("config"), py::arg("rows"), py::arg("up"), py::arg("activation"),
        "silu_mul_quantize (activation 0), gelu_mul_quantize with tanh (1) and none (2).");
}

}  // namespace spense::bindings
