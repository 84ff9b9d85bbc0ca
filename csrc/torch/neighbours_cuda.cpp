// SPDX-License-Identifier: Apache-2.0
// RMSNorm and gated activations with quantisation, on CUDA: check, allocate, launch.
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

  void norm(const Tensor& weight, float eps, bool unit_offset) const {
    cuda::norm_quantize(norm_args(weight, eps, unit_offset), scope.stream());
  }
  Tensor add_norm(const Tensor& residual, const Tensor& weight, float eps, bool unit_offset) const {
    Tensor sum = empty_cuda({args.m, args.k}, residual.scalar_type(), residual);
    cuda::NormArgs all = norm_args(weight, eps, unit_offset);
    set_residual(all, residual, sum);
    cuda::norm_quantize(all, scope.stream());
    return sum;
  }
  void gated(const Tensor& up, Activation activation) const {
    cuda::gated_quantize(gated_args<cuda::GatedArgs>(args, up, activation), scope.stream());
  }

  Tensor x8() const { return first_columns(padded, args.k); }

  DeviceScope scope;
  Tensor padded, scale;
  cuda::QuantizeArgs args;

 private:
  cuda::NormArgs norm_args(const Tensor& weight, float eps, bool unit_offset) const {
    cuda::NormArgs all;
    all.rows = args;
    all.weight = weight.const_data_ptr();
    all.float_weight = weight.scalar_type() == ScalarType::Float;
    all.unit_offset = unit_offset;
    all.eps = eps;
    return all;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spense, CUDA, m) { NeighbourOps<Rows>::register_in(m); }

}  // namespace spense::ops
