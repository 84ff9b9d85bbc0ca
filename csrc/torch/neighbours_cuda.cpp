// SPDX-License-Identifier: Apache-2.0
// RMSNorm and gated activations with quantisation, on CUDA: check, allocate, launch.
#include <tuple>

#include "cuda/neighbours.h"
#include "torch/cuda_memory.h"
#include "torch/neighbours.h"

namespace spense::ops {
namespace {

// Outputs of a call, and the arguments that say where they are. Holds the device while it lives.
struct Rows {
  Rows(const TensorArg& x, const std::optional<Tensor>& gather)
      : scope(x.tensor),
        padded(empty_cuda({x.tensor.size(0), format::padded_k(x.tensor.size(1))},
                          ScalarType::Float8_e4m3fn, x.tensor)),
        scale(empty_cuda({x.tensor.size(0)}, ScalarType::Float, x.tensor)) {
    if (x.tensor.size(1) > cuda::kMaxFusedColumns) {
      x.fail("expected at most ", cuda::kMaxFusedColumns, " columns on CUDA, got ",
             x.tensor.size(1));
    }
    args.m = x.tensor.size(0);
    args.k = x.tensor.size(1);
    args.in = float_type(x, x.tensor.scalar_type());
    args.x = x.tensor.const_data_ptr();
    args.x_stride = row_stride(x.tensor);
    args.gather = gather ? data<int32_t>(*gather) : nullptr;
    args.y = mutable_data<uint8_t>(padded);
    args.y_stride = padded.size(1);
    args.scale = mutable_data<float>(scale);
  }

  Tensor x8() const { return first_columns(padded, args.k); }

  DeviceScope scope;
  Tensor padded, scale;
  cuda::QuantizeArgs args;
};

cuda::NormArgs norm_args(const Rows& rows, const Tensor& weight, double eps, bool unit_offset) {
  cuda::NormArgs args;
  args.rows = rows.args;
  args.weight = weight.const_data_ptr();
  args.float_weight = weight.scalar_type() == ScalarType::Float;
  args.unit_offset = unit_offset;
  args.eps = static_cast<float>(eps);
  return args;
}

std::tuple<Tensor, Tensor> rms_norm_quantize(const Tensor& x, const Tensor& weight,
                                             std::optional<Tensor> gather, double eps,
                                             bool unit_offset) {
  const TensorArg x_arg = SPENSE_ARG("rms_norm_quantize", x);
  check_norm(x_arg, std::nullopt, weight, gather, eps);
  const Rows rows(x_arg, gather);
  cuda::norm_quantize(norm_args(rows, weight, eps, unit_offset), rows.scope.stream());
  return {rows.x8(), rows.scale};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_quantize(const Tensor& x, const Tensor& residual,
                                                         const Tensor& weight,
                                                         std::optional<Tensor> gather, double eps,
                                                         bool unit_offset) {
  const TensorArg x_arg = SPENSE_ARG("add_rms_norm_quantize", x);
  check_norm(x_arg, residual, weight, gather, eps);
  const Rows rows(x_arg, gather);
  Tensor sum = empty_cuda({rows.args.m, rows.args.k}, x.scalar_type(), x);
  cuda::NormArgs args = norm_args(rows, weight, eps, unit_offset);
  args.residual = residual.const_data_ptr();
  args.residual_stride = row_stride(residual);
  args.sum = sum.mutable_data_ptr();
  cuda::norm_quantize(args, rows.scope.stream());
  return {rows.x8(), rows.scale, sum};
}

std::tuple<Tensor, Tensor> gated(const TensorArg& gate, const Tensor& up,
                                 const std::optional<Tensor>& gather, Activation activation) {
  check_gated(gate, up, gather);
  const Rows rows(gate, gather);
  cuda::GatedArgs args;
  args.rows = rows.args;
  args.up = up.const_data_ptr();
  args.up_stride = row_stride(up);
  args.activation = activation;
  cuda::gated_quantize(args, rows.scope.stream());
  return {rows.x8(), rows.scale};
}

std::tuple<Tensor, Tensor> silu_mul_quantize(const Tensor& gate, const Tensor& up,
                                             std::optional<Tensor> gather) {
  return gated(SPENSE_ARG("silu_mul_quantize", gate), up, gather, Activation::kSilu);
}

std::tuple<Tensor, Tensor> gelu_mul_quantize(const Tensor& gate, const Tensor& up,
                                             std::optional<Tensor> gather,
                                             std::string approximate) {
  constexpr const char* op = "gelu_mul_quantize";
  return gated(SPENSE_ARG(op, gate), up, gather, gelu_kind(op, approximate));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spense, CUDA, m) {
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize));
  m.impl("add_rms_norm_quantize", TORCH_BOX(&add_rms_norm_quantize));
  m.impl("silu_mul_quantize", TORCH_BOX(&silu_mul_quantize));
  m.impl("gelu_mul_quantize", TORCH_BOX(&gelu_mul_quantize));
}

}  // namespace spense::ops
