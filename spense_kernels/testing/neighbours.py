# SPDX-License-Identifier: Apache-2.0
"""References of the norm and activation ops: v in float64, and what its quantisation may be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spense_kernels.layout import FP8_MAX
from spense_kernels.quant import AMAX_FLOOR, fp8_to_float

# Relative error of v, before it is quantised.
NORM_ERROR = 9 * 2.0**-24  # p four, q, q / K, + eps (halves); sqrt, 1 /, 1 + w, x * w, * r
GATED_ERROR = 2.0**-15  # as the ops say
SCALE_ERROR = 2.0**-22  # * (1 / 448), 1 / scale, v * that: three roundings and that of 1 / 448


def norm_float64(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(v float64 [M, K], sum in the dtype of x) of (add_)rms_norm_quantize, ungathered."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = total.double()
    root = torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + float(torch.tensor(eps)))
    return wide * root * (weight.double() + (1.0 if unit_offset else 0.0)), total


def gated_float64(gate: Tensor, up: Tensor, gelu: str | None = None) -> Tensor:
    """v float64 [M, K] of silu_mul_quantize, or of gelu_mul_quantize with approximate = `gelu`."""
    g = gate.double()
    if gelu is None:
        v = g / (1 + torch.exp(-g))
    elif gelu == "tanh":
        v = g / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    else:
        v = g * 0.5 * torch.special.erfc(-g * math.sqrt(0.5))
    return v * up.double()


def quantized_excess(x8: Tensor, scale: Tensor, v: Tensor, error: float) -> float:
    """How far x8, scale are outside what quantising v, known to the relative error, may give.

    At most 0 when every scale is amax / 448 within error + SCALE_ERROR, and every byte is a nearest
    e4m3 number of v / scale within twice that (v and amax may err in opposite directions). In units
    of the scale, so 1 means a wrong unit.

    Args:
        x8: float8_e4m3fn [M, K] of finite rows; scale: float32 [M].
        v: float64 [M, K], in the order of x8.
    """
    if not v.numel():
        return 0.0
    slack = error + SCALE_ERROR
    amax = v.abs().amax(dim=1).clamp_min(AMAX_FLOOR)
    exact = amax / FP8_MAX
    scale_excess = ((scale.double() - exact).abs() / exact - slack).max()
    target = (v / exact[:, None]).clamp(-FP8_MAX, FP8_MAX)
    got = fp8_to_float(x8).double()
    # Half the distance to a neighbour: ulp of the octave where the rounding took place.
    largest = torch.maximum(target.abs() * (1 + 2 * slack), torch.tensor(2.0**-6))
    half = torch.exp2(torch.floor(torch.log2(largest)) - 4)
    byte_excess = ((got - target).abs() - half - 2 * slack * target.abs()).max()
    return max(float(scale_excess), float(byte_excess))
