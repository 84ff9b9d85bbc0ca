# SPDX-License-Identifier: Apache-2.0
"""A layer's weight in the checkpoint form: kept values, index nibbles, dense values, scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from spense_kernels.errors import FormatError
from spense_kernels.format import validate
from spense_kernels.format.blocks import blocks
from spense_kernels.format.groups import (
    decode_groups,
    drop_negative_zero,
    encode_groups,
    nan_bytes,
)
from spense_kernels.format.packed import PackedWeight
from spense_kernels.format.split import Run, Split
from spense_kernels.layout import EMPTY_NIBBLE, GROUP, TILE_ROWS, row_bytes, tile_count
from spense_kernels.quant import fp8_to_float, quantize_weight


@dataclass(frozen=True, eq=False)
class HybridWeight:
    """Checkpoint form, version 1 (docs/format.md). All tensors lie on one device.

    Attributes:
        split: which weights are sparse.
        values: uint8 [split.payload_bytes()[0]], FP8 bytes of the kept values.
        indices: uint8 [...[1]], two nibbles of kept places a byte.
        dense: uint8 [...[2]], FP8 bytes of the dense part.
        w_scale: float32 [n], finite and positive.
        bias: float32 [n] or None.

    Blocks lie in order [k_shard][tile], row-major inside over the tile's real rows.
    Sizes, dtypes and devices are checked here, contents by `validate()`.
    """

    split: Split
    values: Tensor
    indices: Tensor
    dense: Tensor
    w_scale: Tensor
    bias: Tensor | None = None

    def __post_init__(self):
        validate.check_arrays(self.split, vars(self))

    @classmethod
    def from_dense(
        cls, weight: Tensor, w_scale: Tensor, split: Split, bias: Tensor | None = None
    ) -> HybridWeight:
        """Encodes a pruned FP8 weight.

        Args:
            weight: FP8 bytes (uint8 or float8_e4m3fn) [n, k], columns in their original order,
                zeros at pruned places. -0.0 counts as zero.
            w_scale: float32 [n]; bias: float32 [n] or None.

        Raises FormatError for a NaN byte, or a group with more than two nonzeros (names the row
        and the group).
        """
        weight = _as_bytes(weight, "HybridWeight.from_dense", split)
        shape = (split.payload_bytes(), split.columns().to(weight.device))
        arrays = [torch.empty(size, dtype=torch.uint8, device=weight.device) for size in shape[0]]
        for run, shard, views in blocks(split, *arrays):
            block = weight[run.first_row : run.last_row][:, shape[1][shard]]
            block = drop_negative_zero(block)
            sparse = split.shard_columns - run.width
            kept, nibbles, crowded = encode_groups(block[:, :sparse])
            if bool(crowded.any()):
                raise FormatError(_crowded_message(split, run, shard, crowded, block))
            for view, part in zip(views, (kept, nibbles, block[:, sparse:]), strict=True):
                view.copy_(part)
        return cls(split, *arrays, w_scale, bias)

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        split: Split,
        bias: Tensor | None = None,
        w_scale: Tensor | None = None,
    ) -> HybridWeight:
        """Quantises a pruned float weight [n, k] with `quantize_weight`, then encodes it."""
        weight8, scale = quantize_weight(weight, w_scale)
        return cls.from_dense(weight8, scale, split, None if bias is None else bias.float())

    def to_dense(self) -> Tensor:
        """FP8 bytes uint8 [n, k], columns in their original order, zeros at pruned places."""
        split = self.split
        weight = torch.empty(split.n, split.k, dtype=torch.uint8, device=self.values.device)
        columns = split.columns().to(weight.device)
        for run, shard, (values, indices, dense) in blocks(
            split, self.values, self.indices, self.dense
        ):
            sparse = decode_groups(values, indices, split.shard_columns - run.width)
            block = torch.cat((sparse, dense), dim=1)
            weight[run.first_row : run.last_row].index_copy_(1, columns[shard], block)
        return weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weight [n, k] in floating point: FP8 value * w_scale, rounded once to dtype."""
        return (fp8_to_float(self.to_dense()) * self.w_scale[:, None]).to(dtype)

    def validate(self) -> HybridWeight:
        """Checks the contents: nibbles, NaN bytes, zeros in padding, scales, bias. Returns self.

        Raises FormatError that names the tensor and the shard, tile and row of the first fault.
        """
        validate.check_contents(self.split, vars(self))
        return self

    def canonical(self) -> HybridWeight:
        """The same weight in the canonical encoding (docs/format.md); writers store no other."""
        return HybridWeight.from_dense(self.to_dense(), self.w_scale, self.split, self.bias)

    def pack(self, device=None) -> PackedWeight:
        """The tile stream that kernels read, on `device` (None: where the weight is)."""
        return PackedWeight.pack(self.split, self.values, self.indices, self.dense, device)

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, split: Split, w_scale: Tensor, bias: Tensor | None = None
    ) -> HybridWeight:
        """Back from a tile stream (canonical encoding); `split` must be the packed weight's.

        Raises RuntimeError when the stream is not one of `split`.
        """
        return cls(split, *packed.unpack(split), w_scale, bias)

    def to(self, device) -> HybridWeight:
        """The same weight on another device."""
        return replace(self, **{name: t.to(device) for name, t in self._tensors().items()})

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Tensors as a checkpoint stores them: `values` and `dense` as float8_e4m3fn, the arrays
        of the split as int32 k_perm [k_shards, k / k_shards] and dense_width [tiles]."""
        device = self.values.device
        state = {
            "values": self.values.view(torch.float8_e4m3fn),
            "indices": self.indices,
            "dense": self.dense.view(torch.float8_e4m3fn),
            "w_scale": self.w_scale,
            "k_perm": self.split.k_perm.to(device, copy=True),
            "dense_width": self.split.dense_width.to(device, copy=True),
        }
        if self.bias is not None:
            state["bias"] = self.bias
        return {prefix + name: tensor for name, tensor in state.items()}

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        prefix: str = "",
        n: int | None = None,
        k: int | None = None,
    ) -> HybridWeight:
        """Reads the tensors `<prefix>values` ... and validates everything (FP8 as float8 or uint8).

        Args:
            n, k: the expected shape; None takes what the tensors say.

        Raises FormatError that names the tensor.
        """
        weight = cls(**validate.read_state_dict(state, prefix, n, k))
        validate.check_contents(weight.split, vars(weight), prefix)
        return weight

    def shard(self, first: int, last: int) -> HybridWeight:
        """K shards [first, last): a tensor-parallel rank's part of a row-parallel layer.

        Only the part that starts at shard 0 keeps the bias, so that the parts' outputs add up.
        """
        split = self.split.shard(first, last)
        parts = {}
        for i, name in enumerate(("values", "indices", "dense")):
            size = self.split.payload_bytes()[i] // self.split.k_shards
            parts[name] = getattr(self, name)[first * size : last * size].clone()
        return HybridWeight(split, **parts, w_scale=self.w_scale, bias=None if first else self.bias)

    def rows(self, tile_first: int, tile_last: int) -> HybridWeight:
        """Output tiles [tile_first, tile_last): a column-parallel slice."""
        split = self.split.rows(tile_first, tile_last)
        offsets = self.split.block_offsets()
        parts = {}
        for i, name in enumerate(("values", "indices", "dense")):
            bounds = offsets[:, (tile_first, tile_last), i].tolist()
            parts[name] = torch.cat([getattr(self, name)[a:b] for a, b in bounds])
        rows = slice(tile_first * TILE_ROWS, tile_first * TILE_ROWS + split.n)
        bias = None if self.bias is None else self.bias[rows].clone()
        return HybridWeight(split, **parts, w_scale=self.w_scale[rows].clone(), bias=bias)

    @staticmethod
    def stack(weights: Sequence[HybridWeight]) -> HybridWeight:
        """One weight for layers that share k_perm (q, k, v; gate, up), stacked by rows.

        Every part but the last is padded to whole tiles with rows of zeros (scale 1, bias 0), so
        the rows of part i stand at `Split.stack_rows([...])[i]`. All or none have a bias.
        """
        split = Split.stack([w.split for w in weights])
        if len({w.bias is None for w in weights}) > 1:
            raise FormatError("HybridWeight.stack: expected a bias in all weights or in none")
        padded = [w._pad_rows() for w in weights[:-1]] + [weights[-1]]
        parts = {name: [] for name in ("values", "indices", "dense")}
        for shard in range(split.k_shards):
            for weight in padded:
                one = weight.split.payload_bytes()
                for i, name in enumerate(parts):
                    size = one[i] // split.k_shards
                    parts[name].append(getattr(weight, name)[shard * size : (shard + 1) * size])
        arrays = {name: torch.cat(pieces) for name, pieces in parts.items()}
        w_scale = torch.cat([w.w_scale for w in padded])
        bias = None if weights[0].bias is None else torch.cat([w.bias for w in padded])
        return HybridWeight(split, **arrays, w_scale=w_scale, bias=bias)

    def unstack(self, rows: Sequence[int]) -> list[HybridWeight]:
        """The inverse of `stack`: parts of `rows[i]` rows each, without the padding rows."""
        tiles = [0, *accumulate(tile_count(n) for n in rows)]
        if tiles[-1] != self.split.tiles:
            raise FormatError(
                f"HybridWeight.unstack: rows must fill {self.split.tiles} tiles, got {list(rows)}"
            )
        parts = [self.rows(first, last) for first, last in pairwise(tiles)]
        return [part._drop_rows(n) for part, n in zip(parts, rows, strict=True)]

    def equal(self, other: HybridWeight) -> bool:
        """Whether split and all tensors agree bit for bit."""
        mine, theirs = self._tensors(), other._tensors()
        return (
            self.split == other.split
            and mine.keys() == theirs.keys()
            and all(torch.equal(mine[name], theirs[name]) for name in mine)
        )

    def __repr__(self) -> str:
        return f"HybridWeight({self.split!r}, bias={self.bias is not None})"

    def _tensors(self) -> dict[str, Tensor]:
        names = ("values", "indices", "dense", "w_scale", "bias")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def _pad_rows(self) -> HybridWeight:
        split, extra = self.split, -self.split.n % TILE_ROWS
        if not extra:
            return self
        sizes = row_bytes(split.shard_columns, split.widths[-1])
        fill = (0, EMPTY_NIBBLE * 0x11, 0)
        arrays = []
        for i, array in enumerate((self.values, self.indices, self.dense)):
            pad = array.new_full((split.k_shards, extra * sizes[i]), fill[i])
            arrays.append(torch.cat((array.view(split.k_shards, -1), pad), dim=1).view(-1))
        padded = Split(split.n + extra, split.k, split.k_perm, split.dense_width)
        w_scale = torch.cat((self.w_scale, self.w_scale.new_ones(extra)))
        bias = None if self.bias is None else torch.cat((self.bias, self.bias.new_zeros(extra)))
        return HybridWeight(padded, *arrays, w_scale, bias)

    def _drop_rows(self, n: int) -> HybridWeight:
        """The first n rows, where the others stand in the last tile."""
        split, extra = self.split, self.split.n - n
        if not extra:
            return self
        sizes = row_bytes(split.shard_columns, split.widths[-1])
        arrays = []
        for i, array in enumerate((self.values, self.indices, self.dense)):
            kept = array.view(split.k_shards, -1)
            arrays.append(kept[:, : kept.shape[1] - extra * sizes[i]].reshape(-1))
        left = Split(n, split.k, split.k_perm, split.dense_width)
        bias = None if self.bias is None else self.bias[:n].clone()
        return HybridWeight(left, *arrays, self.w_scale[:n].clone(), bias)


def _as_bytes(weight: Tensor, where: str, split: Split) -> Tensor:
    if weight.dtype == torch.float8_e4m3fn:
        weight = weight.view(torch.uint8)
    if weight.dtype != torch.uint8 or weight.shape != (split.n, split.k):
        raise FormatError(
            f"{where}: weight must be uint8 or float8_e4m3fn of shape [{split.n}, {split.k}], "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    bad = nan_bytes(weight).any(dim=1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        column = int(nan_bytes(weight[row]).nonzero()[0])
        raise FormatError(f"{where}: weight must be finite, got NaN at row {row}, column {column}")
    return weight


def _crowded_message(split: Split, run: Run, shard: int, crowded: Tensor, block: Tensor) -> str:
    row, group = crowded.nonzero()[0].tolist()
    places = slice(group * GROUP, min((group + 1) * GROUP, split.shard_columns - run.width))
    columns = split.columns()[shard, places].tolist()
    count = int((block[row, places] != 0).sum())
    return (
        f"HybridWeight.from_dense: weight must have at most 2 nonzeros in each group of 4, "
        f"got {count} in row {run.first_row + row}, group {group} of shard {shard} "
        f"(columns {columns})"
    )
