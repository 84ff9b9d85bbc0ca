# SPDX-License-Identifier: Apache-2.0
"""Trainable stand-ins for SpenseLinear: float32 weights, fixed masks, FP8 in the forward pass.

Rounding is straight-through: the forward pass computes what the kernel computes, the backward pass
takes the rounding for the identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spense_kernels import ops
from spense_kernels.errors import PruneError
from spense_kernels.finetune.fuse import Fused
from spense_kernels.format import HybridWeight, Split
from spense_kernels.layout import FP8_MAX
from spense_kernels.linear import SpenseLinear, rows_of
from spense_kernels.quant import AMAX_FLOOR, fp8_product


class StudentLinear(nn.Module):
    """y = fp8(x) @ fp8(weight).T + bias with gradients for x and weight.

    Attributes:
        weight: float32 Parameter [N, K], zero where pruned. It stays so: the gradient is zero
            there, and an optimiser without momentum from elsewhere leaves such a weight alone.
        mask: bool [N, K], True = kept; never changes.
        scale: float32 [N], least scale of every row: where the weights come from FP8 it is theirs,
            so that the first forward pass rounds nothing. A row that grows gets a larger one.
        bias: float32 [N] or None; not trained.
        split: Split of the layer, or None for one that is not going back into a SpenseLinear.
        compiled: on CUDA, whether torch.compile may fuse what is around the matrix products.
    """

    compiled = False

    def __init__(
        self,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None = None,
        split: Split | None = None,
        scale: Tensor | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float() * mask)
        self.register_buffer("mask", mask)
        least = torch.zeros(weight.shape[0], device=weight.device) if scale is None else scale
        self.register_buffer("scale", least.detach().float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.split = split
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_spense(cls, layer: SpenseLinear) -> StudentLinear:
        """The same weight, trainable."""
        hybrid = layer.hybrid_weight()
        weight = hybrid.dequantize()
        mask = kept_places(weight, hybrid.split)
        return cls(weight, mask, hybrid.bias, hybrid.split, hybrid.w_scale)

    def to_spense(self) -> SpenseLinear:
        """The FP8 layer that computes what this one does."""
        codes, scale = quantize_weight(self.weight.detach() * self.mask, self.scale)
        codes = codes.view(torch.uint8)
        codes = torch.where(codes == 0x80, 0, codes)  # -0 counts as zero
        hybrid = HybridWeight.from_dense(codes, scale, self.split, self.bias)
        return SpenseLinear.from_hybrid(hybrid).to(self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        rows = _rows_in_fp8(x, self.compiled)
        y = _Fp8Linear.apply(rows_of(x), rows, self.weight, self.mask, self.scale)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn, recurse=True):
        # What is float32 by definition stays so when a model is cast.
        super()._apply(fn, recurse)
        self.weight.data = self.weight.data.float()
        for name, buffer in self._buffers.items():
            if buffer is not None and name != "mask":
                self._buffers[name] = buffer.float()
        return self


def kept_places(weight: Tensor, split: Split) -> Tensor:
    """bool [N, K]: dense columns of each tile, and the nonzeros elsewhere.

    A kept weight of the sparse part that is exactly zero counts as pruned.
    """
    keep = weight != 0
    columns = split.columns().to(weight.device)  # [k_shards, K / k_shards], sparse first
    for tile, width in enumerate(split.dense_width.tolist()):
        rows = slice(128 * tile, min(128 * (tile + 1), weight.shape[0]))
        if width:
            keep[rows, columns[:, columns.shape[1] - width :].reshape(-1)] = True
    return keep


def quantize_weight(weight: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [N, K] and float32 scale [N] of a float32 weight.

    scale = max(|row|, 1e-12) / 448, at least `least`; codes round weight * (1 / scale).
    """
    # A norm reads the weight once; abs().amax() would write it out in between.
    scale = torch.linalg.vector_norm(weight, torch.inf, dim=1).clamp_min_(AMAX_FLOOR)
    scale *= 1.0 / FP8_MAX
    # 448 * scale / 448 need not round back to scale.
    scale = torch.where(scale > least * (1.0 + 1e-6), scale, least)
    # At most 448 * (1 + 1e-6), which rounds to 448: nothing to clamp.
    return (weight * scale.reciprocal()[:, None]).to(torch.float8_e4m3fn), scale


class _Rows(NamedTuple):
    """Rows of a layer's input as the layer sees them.

    Attributes:
        codes, scale: float8_e4m3fn [M, K] and float32 [M].
        values: codes * scale [M, K] in the dtype of the input.
        version: of the input they were made from, None where it is not counted.
    """

    codes: Tensor
    scale: Tensor
    values: Tensor
    version: int | None


@torch.no_grad()
def _rows_in_fp8(x: Tensor, compiled: bool) -> _Rows:
    """Of x [..., K]; layers that share an input share them."""
    version = None if x.is_inference() else x._version  # an inference tensor has none
    found = getattr(x, "_spense_rows", None)
    if found is None or version is None or found.version != version:
        codes, scale = ops.quantize_fp8(rows_of(x.detach()))
        dequantize = _dequantize if compiled else _dequantize.function
        found = _Rows(codes, scale, dequantize(codes, scale, x.dtype), version)
        x._spense_rows = found
    return found


@Fused
def _dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scale[:, None]).to(dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, weight, mask, scale):
        w8, w_scale = quantize_weight(weight, scale)
        ctx.save_for_backward(rows.values, w8, w_scale, mask)
        return fp8_product(rows.codes, rows.scale, w8, w_scale, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        values, w8, w_scale, mask = ctx.saved_tensors
        dtype = grad.dtype
        x_grad = w_grad = None
        if ctx.needs_input_grad[0]:
            # The scale goes to the weight, which is smaller than the gradient.
            x_grad = grad @ w8.to(dtype).mul_(w_scale[:, None].to(dtype))
        if ctx.needs_input_grad[2]:
            w_grad = _float_product(grad.T, values).mul_(mask)
        return x_grad, None, w_grad, None, None


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, written as such where the library can."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def student_layers(model: nn.Module) -> dict[str, StudentLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, StudentLinear)}


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Let torch.compile fuse what is around the matrix products of a student."""
    layers = student_layers(model).values()
    for layer in layers:
        layer.compiled = True
    try:
        yield
    finally:
        for layer in layers:
            layer.compiled = False


def make_student(model: nn.Module) -> nn.Module:
    """Put a StudentLinear in place of every SpenseLinear; everything else is frozen.

    Raises PruneError when the model holds none.
    """
    model.requires_grad_(False)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, SpenseLinear)]
    if not found:
        raise PruneError(f"finetune: {type(model).__name__} holds no SpenseLinear")
    for name, layer in found:
        model.set_submodule(name, StudentLinear.from_spense(layer))
    return model


def finish_student(model: nn.Module) -> nn.Module:
    """Put a SpenseLinear back in place of every StudentLinear."""
    for name, layer in student_layers(model).items():
        model.set_submodule(name, layer.to_spense())
    return model.requires_grad_(False)
