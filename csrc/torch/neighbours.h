// SPDX-License-Identifier: Apache-2.0
// rms_norm_quantize, add_rms_norm_quantize, silu_mul_quantize and gelu_mul_quantize: checks and
// bodies, the same on every device; save what takes reading gather.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "core/activation.h"
#include "torch/common.h"

namespace spense::ops {

// A second input that goes with x element by element.
inline void check_like(const TensorArg& arg, const TensorArg& x) {
  check_rows(arg);
  check_dtype(arg, {x.tensor.scalar_type()});
  check_shape(arg, {x.tensor.size(0), x.tensor.size(1)});
  check_same_device(arg, x);
}

inline void check_norm(const TensorArg& x, const std::optional<Tensor>& residual,
                       const Tensor& weight, const std::optional<Tensor>& gather, double eps) {
  check_rows_to_quantize(x, gather);
  if (residual) check_like({{x.op, "residual"}, *residual}, x);
  const TensorArg arg{{x.op, "weight"}, weight};
  const ScalarType type = x.tensor.scalar_type();
  if (type == ScalarType::Float) {
    check_dtype(arg, {type});
  } else {
    check_dtype(arg, {type, ScalarType::Float});
  }
  check_shape(arg, {x.tensor.size(1)});
  check_contiguous(arg);
  check_same_device(arg, x);
  if (!(eps >= 0.0)) Arg{x.op, "eps"}.fail("expected at least 0, got ", eps);
}

inline void check_gated(const TensorArg& gate, const Tensor& up,
                        const std::optional<Tensor>& gather) {
  check_rows_to_quantize(gate, gather);
  check_like({{gate.op, "up"}, up}, gate);
}

inline Activation gelu_kind(const char* op, const std::string& approximate) {
  if (approximate == "tanh") return Activation::kGeluTanh;
  if (approximate == "none") return Activation::kGeluErf;
  Arg{op, "approximate"}.fail("expected none or tanh, got ", approximate);
}

// Fields that both devices' arguments have.
template <class NormArgs>
void set_residual(NormArgs& all, const Tensor& residual, Tensor& sum) {
  all.residual = residual.const_data_ptr();
  all.residual_stride = row_stride(residual);
  all.sum = sum.mutable_data_ptr();
}
template <class GatedArgs, class QuantizeArgs>
GatedArgs gated_args(const QuantizeArgs& gate, const Tensor& up, Activation activation) {
  GatedArgs all;
  all.rows = gate;
  all.up = up.const_data_ptr();
  all.up_stride = row_stride(up);
  all.activation = activation;
  return all;
}

// The ops. Rows(x, gather) holds the outputs x8() and scale of a call on one device, and brings
//   norm(weight, eps, unit_offset)                  runs it
//   add_norm(residual, weight, eps, unit_offset)    runs it and returns the sum
//   gated(up, activation)                           runs it
template <class Rows>
struct NeighbourOps {
  static std::tuple<Tensor, Tensor> rms_norm_quantize(const Tensor& x, const Tensor& weight,
                                                      std::optional<Tensor> gather, double eps,
                                                      bool unit_offset) {
    const TensorArg x_arg = SPENSE_ARG("rms_norm_quantize", x);
    check_norm(x_arg, std::nullopt, weight, gather, eps);
    const Rows rows(x_arg, gather);
    rows.norm(weight, static_cast<float>(eps), unit_offset);
    return {rows.x8(), rows.scale};
  }

  static std::tuple<Tensor, Tensor, Tensor> add_rms_norm_quantize(const Tensor& x,
                                                                  const Tensor& residual,
                                                                  const Tensor& weight,
                                                                  std::optional<Tensor> gather,
                                                                  double eps, bool unit_offset) {
    const TensorArg x_arg = SPENSE_ARG("add_rms_norm_quantize", x);
    check_norm(x_arg, residual, weight, gather, eps);
    const Rows rows(x_arg, gather);
    Tensor sum = rows.add_norm(residual, weight, static_cast<float>(eps), unit_offset);
    return {rows.x8(), rows.scale, sum};
  }

  static std::tuple<Tensor, Tensor> silu_mul_quantize(const Tensor& gate, const Tensor& up,
                                                      std::optional<Tensor> gather) {
    return gated(SPENSE_ARG("silu_mul_quantize", gate), up, gather, Activation::kSilu);
  }

  static std::tuple<Tensor, Tensor> gelu_mul_quantize(const Tensor& gate, const Tensor& up,
                                                      std::optional<Tensor> gather,
                                                      std::string approximate) {
    constexpr const char* op = "gelu_mul_quantize";
    return gated(SPENSE_ARG(op, gate), up, gather, gelu_kind(op, approximate));
  }

  static void register_in(auto& m) {
    m.impl("rms_norm_quantize", TORCH_BOX(&NeighbourOps::rms_norm_quantize));
    m.impl("add_rms_norm_quantize", TORCH_BOX(&NeighbourOps::add_rms_norm_quantize));
    m.impl("silu_mul_quantize", TORCH_BOX(&NeighbourOps::silu_mul_quantize));
    m.impl("gelu_mul_quantize", TORCH_BOX(&NeighbourOps::gelu_mul_quantize));
  }

 private:
  static std::tuple<Tensor, Tensor> gated(const TensorArg& gate, const Tensor& up,
                                          const std::optional<Tensor>& gather,
                                          Activation activation) {
    check_gated(gate, up, gather);
    const Rows rows(gate, gather);
    rows.gated(up, activation);
    return {rows.x8(), rows.scale};
  }
};

}  // namespace spense::ops
