// SPDX-License-Identifier: Apache-2.0
// RMSNorm and gated activations with quantisation, on the CPU: check, allocate, call.
#include <algorithm>
#include <tuple>

#include "core/fp8.h"
#include "cpu/dispatch.h"
#include "cpu/neighbours.h"
#include "torch/neighbours.h"

namespace spense::ops {
namespace {

using torch::stable::parallel_for;

Tensor empty_cpu(std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::empty(std::vector<int64_t>(shape), type);
}

// Outputs of a call, and the arguments that say where they are.
struct Rows {
  Rows(const TensorArg& x, const std::optional<Tensor>& gather)
      : padded(empty_cpu({x.tensor.size(0), format::padded_k(x.tensor.size(1))},
                         ScalarType::Float8_e4m3fn)),
        scale(empty_cpu({x.tensor.size(0)}, ScalarType::Float)) {
    args.m = x.tensor.size(0);
    args.k = x.tensor.size(1);
    args.in = float_type(x, x.tensor.scalar_type());
    args.y_stride = padded.size(1);
    if (gather) {
      args.gather = data<int32_t>(*gather);
      if (const int64_t bad = cpu::first_bad_gather(args.gather, args.k); bad >= 0) {
        Arg{x.op, "gather"}.fail("expected columns in [0, ", args.k, "), got ", args.gather[bad],
                                 " at position ", bad);
      }
    }
    if (args.m == 0) return;
    args.x = x.tensor.const_data_ptr();
    args.x_stride = row_stride(x.tensor);
    args.y = mutable_data<uint8_t>(padded);
    args.scale = mutable_data<float>(scale);
  }

  template <typename Args, typename Run>
  void run(const Args& all, Run* rows) const {
    const int64_t worth_a_thread = std::max<int64_t>(1, (int64_t{1} << 13) / args.k);
    parallel_for(0, args.m, worth_a_thread,
                 [&](int64_t begin, int64_t end) { rows(all, begin, end); });
  }

  Tensor x8() const { return first_columns(padded, args.k); }

  Tensor padded, scale;
  cpu::QuantizeArgs args;
};

// weight, or 1 + weight, in float32.
Tensor float_weight(const Tensor& weight, bool unit_offset) {
  const int64_t k = weight.numel();
  const FloatType type = float_type({"rms_norm_quantize", "weight"}, weight.scalar_type());
  Tensor wide = empty_cpu({k}, ScalarType::Float);
  float* out = mutable_data<float>(wide);
  for (int64_t i = 0; i < k; ++i) {
    out[i] = load_float(weight.const_data_ptr(), i, type);
    if (unit_offset) out[i] = 1.0f + out[i];
  }
  return wide;
}

std::tuple<Tensor, Tensor> rms_norm_quantize(const Tensor& x, const Tensor& weight,
                                             std::optional<Tensor> gather, double eps,
                                             bool unit_offset) {
  const TensorArg x_arg = SPENSE_ARG("rms_norm_quantize", x);
  check_norm(x_arg, std::nullopt, weight, gather, eps);
  const Rows rows(x_arg, gather);
  const Tensor wide = float_weight(weight, unit_offset);
  cpu::NormArgs args;
  args.rows = rows.args;
  args.weight = data<float>(wide);
  args.eps = static_cast<float>(eps);
  rows.run(args, cpu::find_quantize(nullptr)->run_norm);
  return {rows.x8(), rows.scale};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_quantize(const Tensor& x, const Tensor& residual,
                                                         const Tensor& weight,
                                                         std::optional<Tensor> gather, double eps,
                                                         bool unit_offset) {
  const TensorArg x_arg = SPENSE_ARG("add_rms_norm_quantize", x);
  check_norm(x_arg, residual, weight, gather, eps);
  const Rows rows(x_arg, gather);
  const Tensor wide = float_weight(weight, unit_offset);
  Tensor sum = empty_cpu({rows.args.m, rows.args.k}, x.scalar_type());
  cpu::NormArgs args;
  args.rows = rows.args;
  args.residual = residual.const_data_ptr();
  args.residual_stride = row_stride(residual);
  args.sum = sum.mutable_data_ptr();
  args.weight = data<float>(wide);
  args.eps = static_cast<float>(eps);
  rows.run(args, cpu::find_quantize(nullptr)->run_norm);
  return {rows.x8(), rows.scale, sum};
}

std::tuple<Tensor, Tensor> gated(const TensorArg& gate, const Tensor& up,
                                 const std::optional<Tensor>& gather, Activation activation) {
  check_gated(gate, up, gather);
  const Rows rows(gate, gather);
  cpu::GatedArgs args;
  args.rows = rows.args;
  args.up = up.const_data_ptr();
  args.up_stride = row_stride(up);
  args.activation = activation;
  rows.run(args, cpu::find_quantize(nullptr)->run_gated);
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

STABLE_TORCH_LIBRARY_IMPL(spense, CPU, m) {
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize));
  m.impl("add_rms_norm_quantize", TORCH_BOX(&add_rms_norm_quantize));
  m.impl("silu_mul_quantize", TORCH_BOX(&silu_mul_quantize));
  m.impl("gelu_mul_quantize", TORCH_BOX(&gelu_mul_quantize));
}

}  // namespace spense::ops
