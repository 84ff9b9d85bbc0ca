# SPDX-License-Identifier: Apache-2.0
"""References of `hybrid_gemm` that start from the checkpoint form, not from the packed bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from spense_kernels.format import HybridWeight
from spense_kernels.quant import fp8_to_float, quantize_fp8_reference


def gathered_weight(weight: HybridWeight) -> Tensor:
    """float32 [n, k]: the unscaled weight with columns in gather order, as x stands."""
    return fp8_to_float(weight.to_dense())[:, weight.split.gather().long()]


def hybrid_gemm_float64(x: Tensor, x_scale: Tensor, weight: HybridWeight) -> Tensor:
    """float64 [m, n] = (x @ w.T) * x_scale * w_scale + bias, nothing rounded to less.

    Args:
        x: float8_e4m3fn [m, k] in gather order; x_scale: float32 [m] or [1].
    """
    y = fp8_to_float(x).double() @ gathered_weight(weight).double().t()
    y = y * x_scale.double()[:, None] * weight.w_scale.double()
    return y if weight.bias is None else y + weight.bias.double()


def hybrid_gemm_plain(
    x: Tensor, x_scale: Tensor, weight: HybridWeight, out_dtype=torch.bfloat16
) -> Tensor:
    """The op in float32 steps: the sum, * x_scale, * w_scale, + bias, then one rounding.

    Bitwise the op's result wherever the sum is exact, so for exact operands.
    """
    y = (fp8_to_float(x) @ gathered_weight(weight).t()) * x_scale[:, None]
    y = y * weight.w_scale
    y = y if weight.bias is None else y + weight.bias
    return y.to(out_dtype)


def linear_float64(x: Tensor, weight: HybridWeight) -> tuple[Tensor, Tensor]:
    """What SpenseLinear computes: (float64 result with x quantised per row, float64 bound).

    The bound limits the error of any order of float32 sums of the same products:
    k * 2^-24 * sum |x8 w8|, scaled like the result (first-order bound on k additions).
    """
    gather = weight.split.gather()
    x8, scale = quantize_fp8_reference(x.reshape(-1, x.shape[-1]), gather)
    y = hybrid_gemm_float64(x8, scale, weight)
    magnitude = fp8_to_float(x8).double().abs() @ gathered_weight(weight).double().abs().t()
    magnitude = magnitude * scale.double()[:, None] * weight.w_scale.double()
    if weight.bias is not None:
        magnitude = magnitude + weight.bias.double().abs()
    return y, magnitude * (weight.split.k + 3) * 2.0**-24
