# SPDX-License-Identifier: Apache-2.0
"""The tensors of one vLLM layer as they arrive, and the weight that a rank makes of them.

A vLLM layer holds one or several layers of the checkpoint (q, k, v; gate, up) and, under tensor
parallelism, some of their rows or some of their K shards. Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from spense_kernels.checkpoint.config import ModuleEntry
from spense_kernels.checkpoint.reader import CheckpointReader
from spense_kernels.errors import CheckpointError, FormatError
from spense_kernels.format import HybridWeight
from spense_kernels.format.slices import join_rows
from spense_kernels.format.validate import DTYPES


@dataclass(frozen=True)
class Part:
    """One layer of the checkpoint inside a vLLM layer.

    Attributes:
        name: in the checkpoint; entry: what config.json says about it.
        rows: [first, last) of its output rows that this rank holds.
    """

    name: str
    entry: ModuleEntry
    rows: tuple[int, int]


@dataclass
class LayerParts:
    """Collects the tensors of a layer, in any order, and builds its weight.

    Attributes:
        parts: shard id, as vLLM's loaders name it (None where there is one part) -> Part.
        k_shards: [first, last) of the K shards that this rank holds; None for all of them.
    """

    parts: Mapping[str | int | None, Part]
    k_shards: tuple[int, int] | None = None
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, short: str, shard_id: str | int | None, tensor: Tensor) -> None:
        """Takes tensor `short` ("values", ...) of one part; checks its dtype and dimensions."""
        if shard_id not in self.parts:
            raise CheckpointError(
                f"{self}: {short}: expected a shard id of {list(self.parts)}, got {shard_id!r}"
            )
        name = self.parts[shard_id].name
        if tensor.dtype != DTYPES[short]:
            raise CheckpointError(
                f"{name}.{short}: expected dtype {DTYPES[short]}, got {tensor.dtype}"
            )
        own = self.tensors.setdefault(name, {})
        if short in own:
            raise CheckpointError(f"{name}.{short}: comes twice")
        own[short] = tensor

    def missing(self) -> list[str]:
        """Full names of the tensors that have not come."""
        return [
            f"{part.name}.{short}"
            for part in self.parts.values()
            for short in CheckpointReader.layer_tensors(part.entry)
            if short not in self.tensors.get(part.name, {})
        ]

    def build(self) -> HybridWeight:
        """The weight of this rank, everything about it checked; lets the tensors go."""
        missing = self.missing()
        if missing:
            raise CheckpointError(f"{missing[0]}: missing tensor")
        whole = [self._part(part) for part in self.parts.values()]
        self.tensors.clear()
        try:
            if self.k_shards is not None:
                whole = [weight.shard(*self.k_shards) for weight in whole]
            rows = [part.rows for part in self.parts.values()]
            return join_rows([(w, *r) for w, r in zip(whole, rows, strict=True)])
        except FormatError as fault:
            raise CheckpointError(f"{self}: {fault}") from fault

    def _part(self, part: Part) -> HybridWeight:
        state = {f"{part.name}.{short}": t for short, t in self.tensors[part.name].items()}
        entry = part.entry
        try:
            weight = HybridWeight.from_state_dict(state, f"{part.name}.", n=entry.n, k=entry.k)
        except FormatError as fault:
            raise CheckpointError(str(fault)) from fault
        if weight.split.k_shards != entry.k_shards:
            raise CheckpointError(
                f"{part.name}.k_perm: expected k_shards = {entry.k_shards} rows as in config.json, "
                f"got {weight.split.k_shards}"
            )
        return weight

    def __str__(self) -> str:
        return " + ".join(part.name for part in self.parts.values())


def shards_of_rank(name: str, k_shards: int, rank: int, ranks: int) -> tuple[int, int]:
    """K shards of a rank of a row-parallel layer; CheckpointError where they do not divide."""
    if k_shards % ranks:
        legal = [size for size in range(1, k_shards + 1) if k_shards % size == 0]
        raise CheckpointError(
            f"{name}: tensor_parallel_size: expected one of {legal}, for the layer has "
            f"k_shards = {k_shards}, got {ranks}. Prune with k_shards a multiple of it"
        )
    each = k_shards // ranks
    return rank * each, (rank + 1) * each


def rows_of_rank(entry: ModuleEntry, name: str, rows: int, index: int) -> tuple[int, int]:
    """Rows of a rank of a column-parallel layer: the `index`-th run of `rows` of them."""
    first, last = index * rows, (index + 1) * rows
    if last > entry.n:
        raise CheckpointError(
            f"{name}: vLLM expects at least {last} rows, config.json says n = {entry.n}"
        )
    return first, last
