// SPDX-License-Identifier: Apache-2.0
// Checks of rms_norm_quantize, add_rms_norm_quantize, silu_mul_quantize and gelu_mul_quantize, the
// same on every device; save what takes reading gather.
#pragma once

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

}  // namespace spense::ops
