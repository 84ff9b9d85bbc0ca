# SPDX-License-Identifier: Apache-2.0
"""Torch twin of the C++ packer: the tile stream written for reading, slow and obvious.

csrc/format/tile_stream.h states the layout; tests compare the op `pack` with this file byte for
byte. Every tile of 128 rows is [sparse unit x su | dense unit x du] over the columns in gather
order:

    sparse unit: 256 columns -> 128 kept bytes a row (swizzled), then 4096 bytes of nibbles
    dense unit:  128 columns -> 128 bytes a row (swizzled)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spense_kernels.errors import FormatError
from spense_kernels.format.groups import (
    decode_groups,
    drop_negative_zero,
    encode_groups,
    pair_nibbles,
    split_nibbles,
)
from spense_kernels.format.split import Split
from spense_kernels.layout import (
    BLOCK_BYTES,
    DENSE_UNIT_BYTES,
    DENSE_UNIT_COLUMNS,
    EMPTY_NIBBLE,
    GROUP,
    KEPT,
    ROW_BYTES,
    SPARSE_UNIT_BYTES,
    SPARSE_UNIT_COLUMNS,
    TILE_ROWS,
    TILE_TABLE_COLUMNS,
    VALUE_BYTES,
    groups_of,
    padded_k,
    row_bytes,
    tile_rows,
)


def value_offsets() -> Tensor:
    """int64 [128, 128]: byte inside a unit of value j of row m. Eight rows share 1024 bytes;
    inside, the 16-byte chunks of row m are permuted by an exclusive or with m % 8."""
    m = torch.arange(TILE_ROWS)[:, None]
    j = torch.arange(ROW_BYTES)[None, :]
    return (m // 8) * 1024 + (m % 8) * 128 + ((j // 16) ^ (m % 8)) * 16 + j % 16


def tile_table(split: Split) -> Tensor:
    """int32 [tiles + 1, 4]: offset in 4096-byte blocks, sparse units, dense units, units before.

    The last row holds the totals (blocks, 0, 0, units).
    """
    rows, blocks, before = [], 0, 0
    for sparse, dense in split.tile_units():
        rows.append((blocks, sparse, dense, before))
        blocks += (sparse * SPARSE_UNIT_BYTES + dense * DENSE_UNIT_BYTES) // BLOCK_BYTES
        before += sparse + dense
    rows.append((blocks, 0, 0, before))
    return torch.tensor(rows, dtype=torch.int32).view(-1, TILE_TABLE_COLUMNS)


def pack_reference(
    values: Tensor, indices: Tensor, dense: Tensor, split: Split
) -> tuple[Tensor, Tensor]:
    """Checkpoint arrays (uint8, CPU) -> (w_packed uint8 [split.packed_bytes], w_tiles).

    Kept places stay as they are; -0.0 becomes +0.0.
    """
    places = value_offsets()
    stream = []
    for tile, width, parts in _tile_blocks(split, values, indices, dense):
        sparse_units, dense_units = split.tile_units()[tile]
        real = tile_rows(split.n, tile)
        columns = split.shard_columns - width
        groups = groups_of(columns)
        nibbles = torch.cat([split_nibbles(i, groups) for _, i, _ in parts], dim=1)
        kept = torch.cat([v.view(real, groups, KEPT) for v, _, _ in parts], dim=1)
        order = _group_order(split, width)[: sparse_units * SPARSE_UNIT_COLUMNS // GROUP]
        unit_groups = SPARSE_UNIT_COLUMNS // GROUP
        for u in range(sparse_units):
            chosen = order[u * unit_groups : (u + 1) * unit_groups]
            rows = torch.zeros(TILE_ROWS, ROW_BYTES, dtype=torch.uint8)
            rows[:real] = kept[:, chosen].reshape(real, ROW_BYTES)
            codes = torch.full((TILE_ROWS, unit_groups), EMPTY_NIBBLE, dtype=torch.uint8)
            codes[:real] = nibbles[:, chosen]
            # Metadata: the 16 bytes of columns 0..127 for every row, then those of 128..255.
            metadata = pair_nibbles(codes).view(TILE_ROWS, 2, 16).transpose(0, 1)
            stream += [_swizzle(rows, places), metadata.reshape(-1)]
        # Everything behind the sparse units goes out as dense columns, pruned zeros included.
        block = [torch.cat((decode_groups(v, i, columns), d), dim=1) for v, i, d in parts]
        everything = torch.zeros(TILE_ROWS, padded_k(split.k), dtype=torch.uint8)
        everything[:real, : split.k] = torch.cat(block, dim=1)[:, split.positions()]
        for u in range(dense_units):
            start = sparse_units * SPARSE_UNIT_COLUMNS + u * DENSE_UNIT_COLUMNS
            stream.append(_swizzle(everything[:, start : start + DENSE_UNIT_COLUMNS], places))
    return torch.cat(stream), tile_table(split)


def unpack_reference(
    w_packed: Tensor, w_tiles: Tensor, split: Split
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `pack_reference`, in the canonical encoding.

    Raises FormatError when the stream's size or table is not that of `split`, or when a sparse
    group holds more than two nonzeros.
    """
    if w_packed.shape != (split.packed_bytes,) or not torch.equal(w_tiles, tile_table(split)):
        raise FormatError(f"unpack_reference: w_packed and w_tiles must be those of {split!r}")
    places = value_offsets()
    arrays = [torch.empty(size, dtype=torch.uint8) for size in split.payload_bytes()]
    for tile, width, parts in _tile_blocks(split, *arrays):
        real = tile_rows(split.n, tile)
        at = int(w_tiles[tile, 0]) * BLOCK_BYTES
        sparse_units, dense_units = split.tile_units()[tile]
        pieces = []
        for _ in range(sparse_units):
            unit = w_packed[at : at + SPARSE_UNIT_BYTES]
            metadata = unit[VALUE_BYTES:].view(2, TILE_ROWS, 16).transpose(0, 1)
            codes = metadata.reshape(TILE_ROWS, -1)
            pieces.append(decode_groups(unit[places], codes, SPARSE_UNIT_COLUMNS))
            at += SPARSE_UNIT_BYTES
        for _ in range(dense_units):
            pieces.append(w_packed[at : at + DENSE_UNIT_BYTES][places])
            at += DENSE_UNIT_BYTES
        gathered = drop_negative_zero(torch.cat(pieces, dim=1)[:real, : split.k])
        by_shard = torch.empty_like(gathered)
        by_shard[:, split.positions()] = gathered
        columns = split.shard_columns - width
        for shard, (values, indices, dense) in enumerate(parts):
            block = by_shard[:, shard * split.shard_columns : (shard + 1) * split.shard_columns]
            kept, codes, crowded = encode_groups(block[:, :columns])
            if bool(crowded.any()):
                raise FormatError(f"unpack_reference: tile {tile} holds a group that is not 2:4")
            values.copy_(kept)
            indices.copy_(codes)
            dense.copy_(block[:, columns:])
    return tuple(arrays)


def _swizzle(rows: Tensor, places: Tensor) -> Tensor:
    unit = torch.empty(VALUE_BYTES, dtype=torch.uint8)
    unit[places] = drop_negative_zero(rows)
    return unit


def _group_order(split: Split, width: int) -> Tensor:
    """Group (shard * groups + group) at each place of the gather order's sparse groups."""
    columns = split.shard_columns - width
    first = split.positions()[: split.k_shards * columns : GROUP]
    shard, position = first // split.shard_columns, first % split.shard_columns
    return shard * groups_of(columns) + position // GROUP


def _tile_blocks(
    split: Split, values: Tensor, indices: Tensor, dense: Tensor
) -> Iterator[tuple[int, int, list[tuple[Tensor, Tensor, Tensor]]]]:
    """(tile, dense width, blocks of each shard as [rows, bytes] views of the three arrays)."""
    offsets = split.block_offsets().tolist()
    for tile, width in enumerate(split.widths):
        rows = tile_rows(split.n, tile)
        sizes = row_bytes(split.shard_columns, width)
        parts = []
        for shard in range(split.k_shards):
            start = offsets[shard][tile]
            parts.append(
                tuple(
                    array[at : at + rows * size].view(rows, size)
                    for array, at, size in zip((values, indices, dense), start, sizes, strict=True)
                )
            )
        yield tile, width, parts
