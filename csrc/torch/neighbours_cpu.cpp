// SPDX-License-Identifier: Apache-2.0
// RMSNorm and gated activations with quantisation, on the CPU: check, allocate, call.
#include <algorithm>

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

  void norm(const Tensor& weight, float eps, bool unit_offset) const {
    const Tensor wide = float_weight(weight, unit_offset);
    run(norm_args(wide, eps), cpu::find_quantize(nullptr)->run_norm);
  }
  Tensor add_norm(const Tensor& residual, const Tensor& weight, float eps, bool unit_offset) const {
    const Tensor wide = float_weight(weight, unit_offset);
    Tensor sum = empty_cpu({args.m, args.k}, residual.scalar_type());
    cpu::NormArgs all = norm_args(wide, eps);
    set_residual(all, residual, sum);
    run(all, cpu::find_quantize(nullptr)->run_norm);
    return sum;
  }
  void gated(const Tensor& up, Activation activation) const {
    run(gated_args<cpu::GatedArgs>(args, up, activation), cpu::find_quantize(nullptr)->run_gated);
  }

  Tensor x8() const { return first_columns(padded, args.k); }

  Tensor padded, scale;
  cpu::QuantizeArgs args;

 private:
  cpu::NormArgs norm_args(const Tensor& float_weight, float eps) const {
    cpu::NormArgs all;
    all.rows = args;
    all.weight = data<float>(float_weight);
    all.eps = eps;
    return all;
  }
  template <typename Args, typename Run>
  void run(const Args& all, Run* rows) const {
    const int64_t worth_a_thread = std::max<int64_t>(1, (int64_t{1} << 13) / args.k);
    parallel_for(0, args.m, worth_a_thread,
                 [&](int64_t begin, int64_t end) { rows(all, begin, end); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spense, CPU, m) { NeighbourOps<Rows>::register_in(m); }

}  // namespace spense::ops
