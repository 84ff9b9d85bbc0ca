# SPDX-License-Identifier: Apache-2.0
"""Legal calls of every op, small and random, for tests of the ops' contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spense_kernels import ops

NIBBLES = torch.tensor([0x4, 0x8, 0x9, 0xC, 0xD, 0xE], dtype=torch.uint8)
# Nibbles legal in a last group of so many columns (the rest of it is padding).
SHORT_NIBBLES = {1: NIBBLES[:1], 2: NIBBLES[:1], 3: NIBBLES[:3]}


@dataclass(frozen=True)
class OpCall:
    """Arguments of one op, by name, in the order of its schema."""

    op: str
    args: dict[str, object]
    kwargs: dict[str, object] = field(default_factory=dict)

    def __call__(self) -> object:
        return getattr(torch.ops.spense, self.op)(*self.args.values(), **self.kwargs)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.args.items() if isinstance(value, Tensor)}

    def with_argument(self, name: str, value: object) -> OpCall:
        """The same call with one argument changed."""
        if name in self.args:
            return replace(self, args=self.args | {name: value})
        return replace(self, kwargs=self.kwargs | {name: value})

    def to(self, device: str) -> OpCall:
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, args=self.args | moved)


def random_fp8(*shape: int) -> Tensor:
    """uint8: bytes of e4m3 numbers, normally distributed, neither NaN nor -0.0."""
    bytes_ = torch.randn(shape).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(bytes_ == 0x80, 0, bytes_)


def _sparse_block(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Values and indices of one block: uint8 [rows, 2 * groups], [rows, ceil(groups / 2)]."""
    groups, short = -(-columns // 4), columns % 4
    values = random_fp8(rows, 2 * groups)
    nibbles = NIBBLES[torch.randint(len(NIBBLES), (rows, groups + groups % 2))]
    if short:
        legal = SHORT_NIBBLES[short]
        nibbles[:, groups - 1] = legal[torch.randint(len(legal), (rows,))]
        if short == 1:
            values[:, -1] = 0
    if groups % 2:
        nibbles[:, -1] = 0x4
    return values, nibbles[:, ::2] | nibbles[:, 1::2] << 4


def random_payload(
    n: int, k: int, dense_width: Sequence[int], k_shards: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """values, indices, dense of a random layer (docs/format.md), uint8, 1-D."""
    parts: tuple[list[Tensor], ...] = ([], [], [])
    columns = k // k_shards
    for _ in range(k_shards):
        for tile, width in enumerate(dense_width):
            rows = min(128, n - 128 * tile)
            block = (*_sparse_block(rows, columns - width), random_fp8(rows, width))
            for part, piece in zip(parts, block, strict=True):
                part.append(piece.flatten())
    values, indices, dense = (torch.cat(part) for part in parts)
    return values, indices, dense


def pack_call(*, n: int, k: int, dense_width: Sequence[int], k_shards: int = 1) -> OpCall:
    values, indices, dense = random_payload(n, k, dense_width, k_shards)
    args = {"values": values, "indices": indices, "dense": dense, "dense_width": list(dense_width)}
    return OpCall("pack", args, {"n": n, "k": k, "k_shards": k_shards})


def unpack_call(*, n: int, k: int, dense_width: Sequence[int], k_shards: int = 1) -> OpCall:
    w_packed, w_tiles = pack_call(n=n, k=k, dense_width=dense_width, k_shards=k_shards)()
    args = {"w_packed": w_packed, "w_tiles": w_tiles, "dense_width": list(dense_width)}
    return OpCall("unpack", args, {"n": n, "k": k, "k_shards": k_shards, "layout": 1})


def quantize_call(*, m: int, k: int, dtype: torch.dtype, gather: bool) -> OpCall:
    order = torch.randperm(k, dtype=torch.int32) if gather else None
    return OpCall("quantize_fp8", {"x": torch.randn(m, k).to(dtype), "gather": order})


def norm_call(
    *,
    m: int,
    k: int,
    dtype: torch.dtype,
    gather: bool = True,
    add: bool = False,
    unit_offset: bool = False,
    weight_dtype: torch.dtype | None = None,
) -> OpCall:
    args: dict[str, object] = {"x": torch.randn(m, k).to(dtype)}
    if add:
        args["residual"] = torch.randn(m, k).to(dtype)
    args["weight"] = torch.randn(k).to(weight_dtype or dtype)
    args["gather"] = torch.randperm(k, dtype=torch.int32) if gather else None
    name = "add_rms_norm_quantize" if add else "rms_norm_quantize"
    return OpCall(name, args, {"eps": 1e-6, "unit_offset": unit_offset})


def gated_call(
    *,
    m: int,
    k: int,
    dtype: torch.dtype,
    gather: bool = True,
    gelu: str | None = None,
    halves: bool = True,
) -> OpCall:
    """silu_mul_quantize, or gelu_mul_quantize with approximate = `gelu`.

    Args:
        halves: gate and up are parts of one [m, 2 k] tensor, as one GEMM leaves them.
    """
    gate, up = (2 * torch.randn(m, 2 * k)).to(dtype).chunk(2, dim=1)
    if not halves:
        gate, up = (t.clone(memory_format=torch.contiguous_format) for t in (gate, up))
    order = torch.randperm(k, dtype=torch.int32) if gather else None
    args = {"gate": gate, "up": up, "gather": order}
    if gelu is None:
        return OpCall("silu_mul_quantize", args)
    return OpCall("gelu_mul_quantize", args, {"approximate": gelu})


def gemm_call(
    *,
    m: int,
    n: int,
    k: int,
    dense_width: Sequence[int],
    bias: bool = False,
    per_tensor: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
) -> OpCall:
    w_packed, w_tiles = pack_call(n=n, k=k, dense_width=dense_width)()
    x, x_scale = ops.quantize_fp8(torch.randn(m, k))
    args = {
        "x": x,
        "w_packed": w_packed,
        "w_tiles": w_tiles,
        "x_scale": torch.rand(1) if per_tensor else x_scale,
        "w_scale": torch.rand(n),
        "bias": torch.randn(n) if bias else None,
    }
    kwargs = {"n": n, "k": k, "layout": 1, "out_dtype": out_dtype}
    return OpCall("hybrid_gemm", args, kwargs)
