# SPDX-License-Identifier: Apache-2.0
"""Walks the blocks of a checkpoint-form payload as matrices."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from spense_kernels.format.split import Run, Split
from spense_kernels.layout import TILE_ROWS, row_bytes

CHUNK_BYTES = 1 << 22  # weights handled at a time: bounds temporaries and stays near the caches


def blocks(
    split: Split, values: Tensor, indices: Tensor, dense: Tensor
) -> Iterator[tuple[Run, int, tuple[Tensor, Tensor, Tensor]]]:
    """(run, shard, views [rows, bytes] of values, indices and dense) for every run and shard."""
    max_tiles = max(1, CHUNK_BYTES // (TILE_ROWS * split.shard_columns))
    offsets = split.block_offsets().tolist()
    for run in split.runs(max_tiles):
        sizes = row_bytes(split.shard_columns, run.width)
        for shard in range(split.k_shards):
            start = offsets[shard][run.first_tile]
            views = tuple(
                array[at : at + run.rows * size].view(run.rows, size)
                for array, at, size in zip((values, indices, dense), start, sizes, strict=True)
            )
            yield run, shard, views
