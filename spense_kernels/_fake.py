# SPDX-License-Identifier: Apache-2.0
"""Fake kernels: the checks of csrc/torch/checks.h in the same words, and shapes without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from spense_kernels.layout import (
    BLOCK_BYTES,
    DENSE_UNIT_BYTES,
    GRANULE,
    LAYOUT_VERSION,
    SPARSE_UNIT_BYTES,
    TILE_ROWS,
    TILE_TABLE_COLUMNS,
    padded_k,
    row_bytes,
    tile_count,
    tile_rows,
    units_of,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Arg:
    """One argument of one op; every check raises `spense::op: name: expected ..., got ...`."""

    def __init__(self, op: str, name: str, value: object = None) -> None:
        self.op, self.name, self.value = op, name, value

    def check(self, holds: bool, expected: str, got: object) -> None:
        torch._check(
            holds, lambda: f"spense::{self.op}: {self.name}: expected {expected}, got {got}"
        )

    def fail(self, expected: str, got: object) -> NoReturn:
        raise RuntimeError(f"spense::{self.op}: {self.name}: expected {expected}, got {got}")

    def dtype(self, *expected: torch.dtype) -> None:
        names = " or ".join(map(_dtype_name, expected))
        self.check(self.value.dtype in expected, f"dtype {names}", _dtype_name(self.value.dtype))

    def dim(self, expected: int) -> None:
        self.check(self.value.dim() == expected, f"{expected} dimensions", self.value.dim())

    def shape(self, *expected: int) -> None:
        shape = self.value.shape
        same = len(shape) == len(expected) and all(
            a == b for a, b in zip(shape, expected, strict=True)
        )
        self.check(same, f"shape {list(expected)}", list(shape))

    def contiguous(self) -> None:
        value = self.value
        got = f"strides {list(value.stride())} for shape {list(value.shape)}"
        self.check(value.is_contiguous(), "a contiguous tensor", got)

    def rows(self) -> None:
        self.dim(2)
        value = self.value
        together = value.shape[0] == 0 or value.shape[1] <= 1 or value.stride(1) == 1
        self.check(together, "stride 1 in the last dimension", value.stride(1))

    def same_device(self, first: _Arg) -> None:
        device = first.value.device
        expected = f"device {device} as of {first.name}"
        self.check(self.value.device == device, expected, self.value.device)

    def at_least_one(self) -> None:
        self.check(self.value >= 1, "at least 1", self.value)

    def bytes(self, expected: int) -> None:
        self.dtype(torch.uint8)
        self.shape(expected)
        self.contiguous()


def _check_layout(op: str, layout: int) -> None:
    expected = f"{LAYOUT_VERSION} (tile stream version {LAYOUT_VERSION})"
    _Arg(op, "layout").check(layout == LAYOUT_VERSION, expected, layout)


def _check_packed(w_packed: _Arg, w_tiles: _Arg, n: int) -> None:
    w_packed.dtype(torch.uint8)
    w_packed.dim(1)
    w_packed.contiguous()
    size = w_packed.value.shape[0]
    w_packed.check(size % BLOCK_BYTES == 0, f"a multiple of {BLOCK_BYTES} bytes", size)
    w_tiles.dtype(torch.int32)
    w_tiles.shape(tile_count(n) + 1, TILE_TABLE_COLUMNS)
    w_tiles.contiguous()


def hybrid_gemm(
    x: Tensor,
    w_packed: Tensor,
    w_tiles: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    n: int,
    k: int,
    layout: int = LAYOUT_VERSION,
    out_dtype: torch.dtype | None = None,
    fast_accum: bool = True,
    config: str | None = None,
) -> Tensor:
    op = "hybrid_gemm"
    _check_layout(op, layout)
    _Arg(op, "n", n).at_least_one()
    _Arg(op, "k", k).at_least_one()
    x_arg = _Arg(op, "x", x)
    x_arg.dtype(torch.float8_e4m3fn)
    x_arg.rows()
    x_arg.check(x.shape[1] == k, f"{k} columns (k)", x.shape[1])
    packed, tiles = _Arg(op, "w_packed", w_packed), _Arg(op, "w_tiles", w_tiles)
    _check_packed(packed, tiles, n)
    scale = _Arg(op, "x_scale", x_scale)
    scale.dtype(torch.float32)
    scale.dim(1)
    count = x_scale.shape[0]
    one_or_all = count == 1 or count == x.shape[0]
    scale.check(one_or_all, f"shape [{x.shape[0]}] or [1]", list(x_scale.shape))
    scale.contiguous()
    channel = _Arg(op, "w_scale", w_scale)
    channel.dtype(torch.float32)
    channel.shape(n)
    channel.contiguous()
    for arg in (packed, tiles, scale, channel):
        arg.same_device(x_arg)
    if bias is not None:
        bias_arg = _Arg(op, "bias", bias)
        bias_arg.dtype(torch.float32)
        bias_arg.shape(n)
        bias_arg.contiguous()
        bias_arg.same_device(x_arg)
    out_dtype = torch.bfloat16 if out_dtype is None else out_dtype
    if out_dtype not in FLOATS:
        _Arg(op, "out_dtype").fail("dtype bfloat16 or float16 or float32", _dtype_name(out_dtype))
    return x.new_empty((x.shape[0], n), dtype=out_dtype)


def _quantized(x_arg: _Arg, gather: Tensor | None) -> tuple[Tensor, Tensor]:
    """Checks rows that get quantised and their gather; x8 and scale."""
    op, x = x_arg.op, x_arg.value
    x_arg.rows()
    x_arg.dtype(*FLOATS)
    m, k = x.shape
    _Arg(op, f"{x_arg.name}.shape[1]", k).at_least_one()
    if gather is not None:
        gather_arg = _Arg(op, "gather", gather)
        gather_arg.dtype(torch.int32)
        gather_arg.shape(k)
        gather_arg.contiguous()
        gather_arg.same_device(x_arg)
    x8 = x.new_empty((m, padded_k(k)), dtype=torch.float8_e4m3fn)[:, :k]
    return x8, x.new_empty((m,), dtype=torch.float32)


def _check_like(arg: _Arg, x_arg: _Arg) -> None:
    """A second input that goes with x element by element."""
    arg.rows()
    arg.dtype(x_arg.value.dtype)
    arg.shape(*x_arg.value.shape)
    arg.same_device(x_arg)


def quantize_fp8(x: Tensor, gather: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _quantized(_Arg("quantize_fp8", "x", x), gather)


def _normed(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, gather: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x_arg = _Arg(op, "x", x)
    result = _quantized(x_arg, gather)
    if residual is not None:
        _check_like(_Arg(op, "residual", residual), x_arg)
    weight_arg = _Arg(op, "weight", weight)
    weight_arg.dtype(*dict.fromkeys((x.dtype, torch.float32)))
    weight_arg.shape(x.shape[1])
    weight_arg.contiguous()
    weight_arg.same_device(x_arg)
    _Arg(op, "eps").check(eps >= 0, "at least 0", f"{eps:g}")
    return result


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    gather: Tensor | None = None,
    *,
    eps: float,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    return _normed("rms_norm_quantize", x, None, weight, gather, eps)


def add_rms_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    gather: Tensor | None = None,
    *,
    eps: float,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    x8, scale = _normed("add_rms_norm_quantize", x, residual, weight, gather, eps)
    return x8, scale, x.new_empty(tuple(x.shape))


def silu_mul_quantize(
    gate: Tensor, up: Tensor, gather: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    gate_arg = _Arg("silu_mul_quantize", "gate", gate)
    result = _quantized(gate_arg, gather)
    _check_like(_Arg("silu_mul_quantize", "up", up), gate_arg)
    return result


def gelu_mul_quantize(
    gate: Tensor, up: Tensor, gather: Tensor | None = None, *, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    op = "gelu_mul_quantize"
    gate_arg = _Arg(op, "gate", gate)
    result = _quantized(gate_arg, gather)
    _check_like(_Arg(op, "up", up), gate_arg)
    _Arg(op, "approximate").check(approximate in ("none", "tanh"), "none or tanh", approximate)
    return result


def _sizes(op: str, dense_width: Sequence[int], n: int, k: int, k_shards: int) -> tuple[int, ...]:
    """(bytes of values, indices, dense, w_packed; tiles) of a split that is checked first."""
    _Arg(op, "n", n).at_least_one()
    tiles = tile_count(n)
    width_arg = _Arg(op, "dense_width")
    one_each = f"{tiles} widths (one for each {TILE_ROWS} rows of n)"
    width_arg.check(len(dense_width) == tiles, one_each, len(dense_width))
    _Arg(op, "k", k).at_least_one()
    _Arg(op, "k_shards", k_shards).at_least_one()
    if k_shards > 1 and k % (GRANULE * k_shards):
        _Arg(op, "k").fail(f"a multiple of {GRANULE} * k_shards = {GRANULE * k_shards}", k)
    columns = k // k_shards
    sizes = [0, 0, 0]
    packed = 0
    for tile, width in enumerate(dense_width):
        legal = width in (0, columns) or (0 < width < columns and width % GRANULE == 0)
        expected = f"0, {columns} or a multiple of {GRANULE} below it"
        width_arg.check(legal, expected, f"{width} (tile {tile})")
        rows = tile_rows(n, tile) * k_shards
        sizes = [a + rows * b for a, b in zip(sizes, row_bytes(columns, width), strict=True)]
        sparse, dense = units_of(k, k_shards * (columns - width))
        packed += sparse * SPARSE_UNIT_BYTES + dense * DENSE_UNIT_BYTES
    return *sizes, packed, tiles


def pack(
    values: Tensor,
    indices: Tensor,
    dense: Tensor,
    dense_width: Sequence[int],
    *,
    n: int,
    k: int,
    k_shards: int = 1,
) -> tuple[Tensor, Tensor]:
    op = "pack"
    *payload, packed, tiles = _sizes(op, dense_width, n, k, k_shards)
    first = _Arg(op, "values", values)
    args = [first, _Arg(op, "indices", indices), _Arg(op, "dense", dense)]
    for arg, size in zip(args, payload, strict=True):
        arg.bytes(size)
    for arg in args[1:]:
        arg.same_device(first)
    w_tiles = values.new_empty((tiles + 1, TILE_TABLE_COLUMNS), dtype=torch.int32)
    return values.new_empty((packed,)), w_tiles


def unpack(
    w_packed: Tensor,
    w_tiles: Tensor,
    dense_width: Sequence[int],
    *,
    n: int,
    k: int,
    k_shards: int = 1,
    layout: int = LAYOUT_VERSION,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "unpack"
    _check_layout(op, layout)
    *payload, packed, _ = _sizes(op, dense_width, n, k, k_shards)
    packed_arg, tiles_arg = _Arg(op, "w_packed", w_packed), _Arg(op, "w_tiles", w_tiles)
    _check_packed(packed_arg, tiles_arg, n)
    tiles_arg.same_device(packed_arg)
    packed_arg.shape(packed)
    values, indices, dense = (w_packed.new_empty((size,)) for size in payload)
    return values, indices, dense
