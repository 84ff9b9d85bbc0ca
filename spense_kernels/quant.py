# SPDX-License-Identifier: Apache-2.0
"""FP8 (float8_e4m3fn) in plain torch: weights per channel, activations per row, their product."""

from __future__ import annotations

import torch
from torch import Tensor

from spense_kernels.errors import FormatError
from spense_kernels.layout import FP8_MAX, ceil_div

AMAX_FLOOR = 1e-12  # keeps the scale of an all-zero row positive


def round_fp8(x: Tensor) -> Tensor:
    """Nearest float8_e4m3fn (ties to even), saturating at +-448; NaN stays NaN.

    Args:
        x: floating point, any shape.
    """
    return x.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def weight_scale(weight: Tensor) -> Tensor:
    """float32 [..., N] of [..., N, K]: max(|row|, 1e-12) / 448: a row's largest becomes 448."""
    amax = weight.float().abs().amax(dim=-1).clamp_min(AMAX_FLOOR)
    return amax / FP8_MAX


def quantize_weight(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per-output-channel FP8 weight.

    Args:
        weight: floating point [N, K].
        scale: float32 [N] to use; None takes `weight_scale`.

    Returns:
        FP8 bytes uint8 [N, K] and scale float32 [N], weight ~ fp8 * scale.

    Raises FormatError when a weight is NaN or Inf.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise FormatError(
            f"quantize_weight: weight must be floating point [N, K], got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    finite = torch.isfinite(weight.float().abs().amax(dim=1))
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise FormatError(f"quantize_weight: weight must be finite, row {row} has NaN or Inf")
    if scale is None:
        scale = weight_scale(weight)
    return round_fp8(weight.float() / scale[:, None]).view(torch.uint8), scale


def fp8_to_float(weight: Tensor) -> Tensor:
    """FP8 bytes (uint8) or float8_e4m3fn -> float32, exactly."""
    return weight.view(torch.float8_e4m3fn).to(torch.float32)


def quantize_fp8_reference(x: Tensor, gather: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Torch twin of the op `quantize_fp8`.

    Args:
        x: bf16, fp16 or fp32 [M, K].
        gather: int32 [K]; column p of the result is column gather[p] of x.

    Returns:
        x8 float8_e4m3fn [M, K], a view on rows padded with zeros to a multiple of 128, and scale
        float32 [M] = max(|row|, 1e-12) * (1 / 448). A row with NaN or Inf gets scale NaN and bytes
        0x7F (NaN).
    """
    m, k = x.shape
    one = torch.ones((), dtype=torch.float32, device=x.device)
    amax = x.float().abs().amax(dim=1).clamp_min(AMAX_FLOOR)
    scale = torch.where(torch.isfinite(amax), amax, torch.nan) * (one / FP8_MAX)
    inverse = one / scale
    rounded = round_fp8(x.float() * inverse[:, None]).view(torch.uint8)
    rounded[torch.isnan(scale)] = 0x7F
    if gather is not None:
        rounded = rounded[:, gather.long()]
    padded = torch.zeros(m, ceil_div(k, 128) * 128, dtype=torch.uint8, device=x.device)
    padded[:, :k] = rounded
    return padded.view(torch.float8_e4m3fn)[:, :k], scale


def fp8_product(
    x8: Tensor,
    x_scale: Tensor,
    w8: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """What an FP8 linear layer computes, without packing, on any device: [M, N] in `dtype` of
    (x8 @ w8.T) * x_scale[m] * w_scale[n] + bias[n].

    Args:
        x8: float8_e4m3fn [M, K].
        x_scale: float32 [M].
        w8: float8_e4m3fn [N, K], or the same values in `product_dtype(dtype)`.
        w_scale: float32 [N].
        dtype: float32, bfloat16 or float16.
        bias: float32 [N] or None.
    """
    if w8.dtype == torch.float8_e4m3fn and has_fp8_matmul(w8, dtype):
        y = torch._scaled_mm(
            x8, w8.T, scale_a=x_scale[:, None], scale_b=w_scale[None], out_dtype=dtype
        )
        return y if bias is None else (y + bias).to(dtype)
    work = product_dtype(dtype)
    y = (x8.to(work) @ w8.to(work).T).float() * x_scale[:, None] * w_scale
    return (y if bias is None else y + bias).to(dtype)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What codes are multiplied in: they are exact in bfloat16; sums of theirs overflow float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def has_fp8_matmul(w8: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch multiplies FP8 by a weight [N, K] of this shape on its device."""
    if not w8.is_cuda or dtype != torch.bfloat16 or w8.shape[0] % 16 or w8.shape[1] % 16:
        return False
    return torch.cuda.get_device_capability(w8.device) >= (9, 0)
