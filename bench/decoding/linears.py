# SPDX-License-Identifier: Apache-2.0
"""The linear layers of one kind: dense cuBLASLt, two libraries, ours.

Weights are random, scaled so that activations keep their size from layer to layer.

A layer is called with x8 [m, k] and x_scale [m] as the quantising ops leave them and returns bf16
[m, n]. `gather` is the order in which it wants x8, None for the order as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from gemm.operands import random_fp8, tile_stream, tiles_of, two_of_four, unit_scale
from gemm.rivals import CusparseLt, sparse_columns
from gemm.shapes import Layer
from gemm.timing import Recorder
from torch import Tensor

from spense_kernels import ops
from spense_kernels.format import Split

BF16 = torch.bfloat16
ROWS = 16  # of x, that cuSPARSELt asks for a multiple of
BIAS = 0.1  # size of biases, beside products of about 1
X_SCALE = 1 / 112  # of quantised x: normal values, the largest of a few thousand becomes 448
# So that attention prefers some places of the cache, as that of a model does: with means over all
# of them the tokens of a prompt would become alike from layer to layer. o makes up for it.
GAIN = {"qkv": 2.5, "o": 0.4}


class Dense:
    """torch._scaled_mm, cuBLASLt in FP8 with fast accumulation.

    Scaled a tensor, which is faster than a row and spares it the work; on the CPU plain float32.
    """

    gather = None

    def __init__(self, n: int, k: int, bias: bool, device: torch.device, gain: float = 1.0):
        self.weight = random_fp8(n, k, device=device).view(torch.float8_e4m3fn)
        self.scale = torch.full((), gain * unit_scale(k), device=device)
        self.x_scale = torch.full((), X_SCALE, device=device)
        self.bias = torch.randn(n, device=device).mul_(BIAS).to(BF16) if bias else None
        self.weight_bytes = n * k

    def __call__(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        if x8.device.type == "cpu":
            y = x8.float() @ self.weight.float().t() * self.scale * x_scale[:, None]
            return (y if self.bias is None else y + self.bias).to(BF16)
        return torch._scaled_mm(
            x8,
            self.weight.t(),
            scale_a=self.x_scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=BF16,
            use_fast_accum=True,
        )


class TwoLibrary:
    """cuSPARSELt on the sparse columns, cuBLASLt on the dense ones, and their sum.

    Generous to it: both find their part of x in place (x itself is not read), it has no scales of
    rows, and cuSPARSELt runs the fastest of its algorithms for these rows.
    """

    gather = None

    def __init__(
        self,
        n: int,
        k: int,
        bias: bool,
        device: torch.device,
        *,
        d: float,
        rows: list[int],
        recorder: Recorder,
    ):
        self.columns = sparse_columns(_split(n, k, d))
        self.algorithms = _algorithms(n, k, self.columns, tuple(rows), recorder)
        self.sparse = torch._cslt_compress(two_of_four(n, self.columns, device))
        self.dense = Dense(n, k - self.columns, bias, device) if self.columns < k else None
        self.inputs = {m: _inputs(m, self.columns, k - self.columns, device) for m in rows}
        self.weight_bytes = self.sparse.nbytes + (self.dense.weight_bytes if self.dense else 0)

    def __call__(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        m = x8.shape[0]
        sparse, dense, scale = self.inputs[m]
        algorithm, split_k, mode = self.algorithms[m]
        y = torch._cslt_sparse_mm(
            self.sparse,
            sparse.t(),
            out_dtype=BF16,
            transpose_result=True,
            alg_id=algorithm,
            split_k=split_k,
            split_k_mode=mode,
        )[:m]
        return y if self.dense is None else y.add_(self.dense(dense, scale))


@cache
def _inputs(m: int, sparse: int, dense: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    padded = -(-m // ROWS) * ROWS

    def some(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device).to(torch.float8_e4m3fn)

    x = some(padded, sparse)
    return x, some(m, dense) if dense else x, torch.ones(m, device=device)


@cache
def _algorithms(
    n: int, k: int, columns: int, rows: tuple[int, ...], recorder: Recorder
) -> dict[int, tuple[int, int, int]]:
    """Number of rows -> the fastest algorithm of cuSPARSELt."""
    rival = CusparseLt(Layer("", f"{n}x{k}", n, k), recorder.device, recorder.quick, columns)
    for m in rows:
        rival.calls(m)
    return {m: rival.chosen[-(-m // ROWS) * ROWS] for m in rows}


class Spense:
    """hybrid_gemm at dense fraction d; x in a random order of columns, or as it is."""

    def __init__(
        self,
        n: int,
        k: int,
        bias: bool,
        device: torch.device,
        gain: float = 1.0,
        *,
        d: float,
        in_order: bool,
    ):
        self.n, self.k = n, k
        self.split = _split(n, k, d)
        self.stream = tile_stream(self.split, device)
        self.tiles = _tiles(n, k, d, device)
        kept = (k + self.split.widths[0]) // 2
        self.w_scale = torch.full((n,), gain * unit_scale(kept), device=device)
        self.bias = torch.randn(n, device=device).mul_(BIAS) if bias else None
        order = torch.randperm(k, device=device, dtype=torch.int32)
        self.gather = None if in_order else order
        self.weight_bytes = self.stream.nbytes

    def __call__(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        weight = self.stream, self.tiles, x_scale, self.w_scale, self.bias
        return ops.hybrid_gemm(x8, *weight, n=self.n, k=self.k)


@cache
def _split(n: int, k: int, d: float) -> Split:
    return Split.from_fraction(n, k, d)


@cache
def _tiles(n: int, k: int, d: float, device: torch.device) -> Tensor:
    return tiles_of(_split(n, k, d), device)


Linear = Dense | TwoLibrary | Spense
Factory = Callable[[str, int, int, bool], Linear]


def factory(
    kind: str, d: float | None, device: torch.device, rows: list[int], recorder: Recorder
) -> Factory:
    """make(name, n, k, bias) for `kind` of KINDS; rows: the numbers of rows that will be asked."""

    def make(name: str, n: int, k: int, bias: bool) -> Linear:
        gain = GAIN.get(name, 1.0)
        if kind == "dense":
            return Dense(n, k, bias, device, gain)
        if kind == "two_library":
            return TwoLibrary(n, k, bias, device, d=d, rows=rows, recorder=recorder)
        # The pruner sorts the rows of gate and up, so that down takes its columns as they come.
        return Spense(n, k, bias, device, gain, d=d, in_order=name == "down")

    return make


KINDS = ("dense", "spense", "two_library")
