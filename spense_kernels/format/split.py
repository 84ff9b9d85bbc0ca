# SPDX-License-Identifier: Apache-2.0
"""The split of a layer: which columns of which rows are 2:4 sparse and which stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from spense_kernels.errors import FormatError
from spense_kernels.layout import (
    DENSE_UNIT_BYTES,
    GRANULE,
    SPARSE_UNIT_BYTES,
    TILE_ROWS,
    ceil_div,
    row_bytes,
    tile_count,
    tile_rows,
    units_of,
)


@dataclass(frozen=True)
class Run:
    """Consecutive tiles of one dense width; their blocks form one row-major matrix a shard."""

    first_tile: int
    last_tile: int  # exclusive
    first_row: int
    last_row: int  # exclusive
    width: int

    @property
    def rows(self) -> int:
        return self.last_row - self.first_row


@dataclass(frozen=True, eq=False)
class Split:
    """Split of a weight [n, k] into a 2:4 part and a dense part.

    Attributes:
        n, k: output rows and input columns, both >= 1.
        k_perm: int32 [k_shards, k / k_shards] on the CPU. k_perm[s, p] is the column, counted
            inside shard s, that stands at position p: sparse columns first, dense ones last.
        dense_width: int32 [ceil(n / 128)] on the CPU. Dense columns of each tile in every shard:
            0, all of the shard, or a multiple of 16 below that.

    Raises FormatError when an array breaks these rules. More than one shard needs
    k % (16 * k_shards) == 0.
    """

    n: int
    k: int
    k_perm: Tensor
    dense_width: Tensor

    def __post_init__(self):
        _check_size("n", self.n)
        _check_size("k", self.k)
        perm = _int32(self.k_perm, "k_perm", dims=2)
        width = _int32(self.dense_width, "dense_width", dims=1)
        shards, shard_columns = perm.shape
        if shards < 1 or shards * shard_columns != self.k:
            raise FormatError(
                f"Split: k_perm must have shape [k_shards, k / k_shards] with {self.k} elements, "
                f"got {list(perm.shape)}"
            )
        _check_shards(self.k, shards)
        _check_permutation(perm)
        _check_widths(width, self.n, shard_columns)
        object.__setattr__(self, "k_perm", perm)
        object.__setattr__(self, "dense_width", width)

    @classmethod
    def uniform(cls, n: int, k: int, dense_columns: int, k_perm=None, k_shards: int = 1) -> Split:
        """Every tile keeps the same columns dense.

        Args:
            dense_columns: dense columns of the whole layer, over all shards together: 0, k or a
                multiple of 16 * k_shards.
            k_perm: [k_shards, k / k_shards] or, with one shard, [k]; None keeps columns in place.
        """
        _check_size("n", n)
        _check_size("k", k)
        _check_shards(k, k_shards)
        if dense_columns % k_shards or not 0 <= dense_columns <= k:
            raise FormatError(
                f"Split.uniform: dense_columns must be 0..{k} and divide by k_shards={k_shards}, "
                f"got {dense_columns}"
            )
        width = torch.full(
            (tile_count(n),), dense_columns // k_shards, dtype=torch.int32, device="cpu"
        )
        return cls(n, k, _default_perm(k, k_perm, k_shards), width)

    @classmethod
    def from_fraction(cls, n: int, k: int, d: float, k_perm=None, k_shards: int = 1) -> Split:
        """`uniform` with the dense fraction d in [0, 1], rounded to the granule.

        The dense columns of a shard are the legal width nearest to d * k / k_shards (halves go
        up): a multiple of 16, or the whole shard. `dense_fraction` tells what was reached.
        """
        if not 0.0 <= d <= 1.0:
            raise FormatError(f"Split.from_fraction: d must be in 0..1, got {d}")
        _check_size("k", k)
        _check_shards(k, k_shards)
        shard_columns = k // k_shards
        target = d * shard_columns
        below = int(target) // GRANULE * GRANULE
        above = min(below + GRANULE, shard_columns)
        width = above if target - below >= above - target else below
        return cls.uniform(n, k, width * k_shards, k_perm, k_shards)

    @property
    def k_shards(self) -> int:
        return self.k_perm.shape[0]

    @property
    def shard_columns(self) -> int:
        """Columns of one K shard."""
        return self.k_perm.shape[1]

    @property
    def tiles(self) -> int:
        return self.dense_width.shape[0]

    @property
    def widths(self) -> list[int]:
        """dense_width as a list, the form the ops take."""
        return self.dense_width.tolist()

    @property
    def dense_fraction(self) -> float:
        """Share of the n * k weights that are kept dense (padding does not count)."""
        dense = sum(tile_rows(self.n, t) * w for t, w in enumerate(self.widths))
        return dense * self.k_shards / (self.n * self.k)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the tile stream (`w_packed`)."""
        return sum(s * SPARSE_UNIT_BYTES + d * DENSE_UNIT_BYTES for s, d in self.tile_units())

    @property
    def logical_bytes(self) -> int:
        """Bytes the weights need without any padding: 1 a dense weight, 5/8 a sparse one."""
        eighths = 0
        for t, w in enumerate(self.widths):
            eighths += tile_rows(self.n, t) * (8 * w + 5 * (self.shard_columns - w))
        return ceil_div(eighths * self.k_shards, 8)

    @property
    def padding_waste(self) -> int:
        """Bytes of the tile stream beyond `logical_bytes`: padding and zeros written out."""
        return self.packed_bytes - self.logical_bytes

    def tile_units(self) -> list[tuple[int, int]]:
        """(sparse units, dense units) of each tile."""
        return [units_of(self.k, self.k_shards * (self.shard_columns - w)) for w in self.widths]

    def payload_bytes(self) -> tuple[int, int, int]:
        """Elements (= bytes) of `values`, `indices` and `dense` in the checkpoint form."""
        totals = [0, 0, 0]
        for run in self.runs():
            for i, size in enumerate(row_bytes(self.shard_columns, run.width)):
                totals[i] += run.rows * size * self.k_shards
        return tuple(totals)

    def block_offsets(self) -> Tensor:
        """int64 [k_shards, tiles + 1, 3]: where the block of (shard, tile) starts in `values`,
        `indices` and `dense`; entry `tiles` is the end of the shard."""
        rows = torch.full((self.tiles,), TILE_ROWS, dtype=torch.int64, device="cpu")
        rows[-1] = tile_rows(self.n, self.tiles - 1)
        sizes = [row_bytes(self.shard_columns, w) for w in self.widths]
        block = torch.tensor(sizes, dtype=torch.int64, device="cpu") * rows[:, None]
        prefix = torch.zeros(self.tiles + 1, 3, dtype=torch.int64, device="cpu")
        prefix[1:] = block.cumsum(0)
        shards = torch.arange(self.k_shards, dtype=torch.int64, device="cpu")
        return prefix[None] + shards[:, None, None] * prefix[-1]

    def runs(self, max_tiles: int | None = None) -> list[Run]:
        """Maximal runs of tiles with equal width, cut to at most `max_tiles` tiles each."""
        widths = self.widths
        result, first = [], 0
        for t in range(1, self.tiles + 1):
            full = max_tiles is not None and t - first >= max_tiles
            if t == self.tiles or widths[t] != widths[first] or full:
                rows = (first * TILE_ROWS, min(t * TILE_ROWS, self.n))
                result.append(Run(first, t, *rows, widths[first]))
                first = t
        return result

    def shell_bounds(self) -> list[int]:
        """Positions in a shard where a dense block in use starts, with 0 and the shard's end."""
        starts = {self.shard_columns - w for w in self.widths}
        return sorted(starts | {0, self.shard_columns})

    def columns(self) -> Tensor:
        """int64 [k_shards, k / k_shards]: `k_perm` as absolute columns."""
        shards = torch.arange(self.k_shards, dtype=torch.int64, device="cpu")
        return self.k_perm.long() + shards[:, None] * self.shard_columns

    def positions(self) -> Tensor:
        """int64 [k]: the place (shard * shard_columns + position) of each gather position."""
        flat = torch.arange(self.k, dtype=torch.int64, device="cpu")
        return self._shell_order(flat.view(self.k_shards, self.shard_columns))

    def gather(self) -> Tensor:
        """int32 [k]: absolute column at each place of the one-device order x'.

        Shell by shell (a shell lies between two neighbouring dense widths in use), shard by shard
        inside a shell. In this order the sparse columns of every tile come first.
        """
        return self._shell_order(self.columns()).to(torch.int32)

    def _shell_order(self, by_shard: Tensor) -> Tensor:
        bounds = self.shell_bounds()
        return torch.cat([by_shard[:, a:b].reshape(-1) for a, b in pairwise(bounds)])

    def shard(self, first: int, last: int) -> Split:
        """The split of K shards [first, last): what one tensor-parallel rank of a row-parallel
        layer holds. Its columns count from the first column of shard `first`."""
        _check_range("Split.shard", first, last, self.k_shards, "k_shards")
        k = (last - first) * self.shard_columns
        return Split(self.n, k, self.k_perm[first:last].clone(), self.dense_width)

    def rows(self, tile_first: int, tile_last: int) -> Split:
        """The split of output tiles [tile_first, tile_last): a column-parallel slice."""
        _check_range("Split.rows", tile_first, tile_last, self.tiles, "tiles")
        n = min(tile_last * TILE_ROWS, self.n) - tile_first * TILE_ROWS
        return Split(n, self.k, self.k_perm, self.dense_width[tile_first:tile_last].clone())

    @staticmethod
    def stack(splits: Sequence[Split]) -> Split:
        """One split for layers that read the same input (q, k, v; gate, up), stacked by rows.

        All must have the same k_perm. Every part but the last is padded to whole tiles;
        `stack_rows` tells where the rows of each part then are.
        """
        if not splits:
            raise FormatError("Split.stack: splits must not be empty")
        for i, part in enumerate(splits):
            if not torch.equal(part.k_perm, splits[0].k_perm):
                raise FormatError(
                    f"Split.stack: all splits must share one k_perm, but splits[{i}] "
                    f"(k={part.k}, k_shards={part.k_shards}) differs from splits[0] "
                    f"(k={splits[0].k}, k_shards={splits[0].k_shards})"
                )
        n = Split.stack_rows(splits)[-1][1]
        width = torch.cat([part.dense_width for part in splits])
        return Split(n, splits[0].k, splits[0].k_perm, width)

    @staticmethod
    def stack_rows(splits: Sequence[Split]) -> list[tuple[int, int]]:
        """(first, last) output row of each part inside the stacked layer."""
        ranges, tile = [], 0
        for part in splits:
            ranges.append((tile * TILE_ROWS, tile * TILE_ROWS + part.n))
            tile += part.tiles
        return ranges

    def __eq__(self, other) -> bool:
        if not isinstance(other, Split):
            return NotImplemented
        return (
            (self.n, self.k) == (other.n, other.k)
            and torch.equal(self.k_perm, other.k_perm)
            and torch.equal(self.dense_width, other.dense_width)
        )

    __hash__ = None

    def __repr__(self) -> str:
        widths = sorted(set(self.widths))
        text = str(widths[0]) if len(widths) == 1 else f"{widths[0]}..{widths[-1]}"
        return (
            f"Split(n={self.n}, k={self.k}, k_shards={self.k_shards}, dense_width={text}, "
            f"d={self.dense_fraction:.4f})"
        )


def _check_size(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError(f"Split: {name} must be an int >= 1, got {value!r}")


def _check_shards(k: int, k_shards: int) -> None:
    if not isinstance(k_shards, int) or k_shards < 1:
        raise FormatError(f"Split: k_shards must be an int >= 1, got {k_shards!r}")
    if k_shards > 1 and k % (GRANULE * k_shards):
        raise FormatError(
            f"Split: k must be a multiple of {GRANULE} * k_shards = {GRANULE * k_shards}, got {k}"
        )


def _check_range(where: str, first: int, last: int, count: int, what: str) -> None:
    if not 0 <= first < last <= count:
        raise FormatError(
            f"{where}: expected 0 <= first < last <= {what}={count}, got first={first}, last={last}"
        )


def _int32(value, name: str, dims: int) -> Tensor:
    tensor = torch.as_tensor(value, device="cpu")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise FormatError(f"Split: {name} must have an integer dtype, got {tensor.dtype}")
    if tensor.dim() != dims:
        raise FormatError(f"Split: {name} must have {dims} dimensions, got {list(tensor.shape)}")
    # A copy: a split must not change with the caller's tensor (or the file it is mapped to).
    narrow = tensor.to(torch.int32, copy=True).contiguous()
    if not torch.equal(narrow.long(), tensor.long()):
        raise FormatError(f"Split: {name} must fit int32")
    return narrow


def _check_permutation(perm: Tensor) -> None:
    expected = torch.arange(perm.shape[1], dtype=torch.int32, device="cpu")
    wrong = (perm.sort(dim=1).values != expected).any(dim=1)
    if wrong.any():
        raise FormatError(
            f"Split: k_perm must be a permutation of 0..{perm.shape[1] - 1} in every shard, "
            f"but shard {int(wrong.nonzero()[0])} is not"
        )


def _check_widths(width: Tensor, n: int, shard_columns: int) -> None:
    if width.shape[0] != tile_count(n):
        raise FormatError(
            f"Split: dense_width must have one entry per {TILE_ROWS} rows = {tile_count(n)}, "
            f"got {width.shape[0]}"
        )
    legal = (width >= 0) & (width < shard_columns) & (width % GRANULE == 0)
    legal |= width == shard_columns
    if not legal.all():
        tile = int((~legal).nonzero()[0])
        raise FormatError(
            f"Split: dense_width must be a multiple of {GRANULE} below {shard_columns} or "
            f"{shard_columns} itself, got {int(width[tile])} at tile {tile}"
        )


def _default_perm(k: int, k_perm, k_shards: int) -> Tensor:
    if k_perm is None:
        return torch.arange(k // k_shards, dtype=torch.int32, device="cpu").repeat(k_shards, 1)
    perm = torch.as_tensor(k_perm, device="cpu")
    if perm.dim() == 1 and k_shards == 1:
        perm = perm[None]
    if perm.dim() != 2 or perm.shape[0] != k_shards:
        raise FormatError(
            f"Split: k_perm must have shape [{k_shards}, {k // k_shards}], got {list(perm.shape)}"
        )
    return perm
