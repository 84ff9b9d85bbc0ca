# SPDX-License-Identifier: Apache-2.0
"""Any rows of several layers as one weight, as tensor-parallel ranks hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spense_kernels.errors import FormatError
from spense_kernels.format.hybrid_weight import HybridWeight
from spense_kernels.format.split import Split
from spense_kernels.layout import TILE_ROWS, tile_count


def join_rows(pieces: Sequence[tuple[HybridWeight, int, int]]) -> HybridWeight:
    """Rows [first, last) of each weight below each other, without a gap.

    Where pieces start and end on whole tiles of 128 rows, tiles are taken as they are. Otherwise
    rows of different pieces or tiles share a tile: it takes the largest dense width among them, so
    that a row that was sparse there keeps its zeros in dense columns. The values never change.

    Args:
        pieces: (weight, first, last); all weights share one k_perm, and all or none have a bias.

    Raises FormatError otherwise, and for rows that a weight does not have.
    """
    if not pieces:
        raise FormatError("join_rows: pieces must not be empty")
    perm = pieces[0][0].split.k_perm
    for i, (weight, first, last) in enumerate(pieces):
        if not 0 <= first < last <= weight.split.n:
            raise FormatError(
                f"join_rows: pieces[{i}]: expected 0 <= first < last <= {weight.split.n}, "
                f"got first={first}, last={last}"
            )
        if not torch.equal(weight.split.k_perm, perm):
            raise FormatError(f"join_rows: pieces[{i}]: its k_perm differs from that of pieces[0]")
        if (weight.bias is None) != (pieces[0][0].bias is None):
            raise FormatError(f"join_rows: pieces[{i}]: all or none must have a bias")
    if _on_tiles(pieces):
        parts = [w.rows(first // TILE_ROWS, tile_count(last)) for w, first, last in pieces]
        return parts[0] if len(parts) == 1 else HybridWeight.stack(parts)
    return _encode_again(pieces)


def _on_tiles(pieces: Sequence[tuple[HybridWeight, int, int]]) -> bool:
    """Whether every piece starts on a tile, and ends on one or, the last, with its weight."""
    starts = all(first % TILE_ROWS == 0 for _, first, _ in pieces)
    ends = all(last % TILE_ROWS == 0 for _, _, last in pieces[:-1])
    weight, _, last = pieces[-1]
    return starts and ends and (last % TILE_ROWS == 0 or last == weight.split.n)


def _encode_again(pieces: Sequence[tuple[HybridWeight, int, int]]) -> HybridWeight:
    dense = torch.cat([weight.to_dense()[first:last] for weight, first, last in pieces])
    w_scale = torch.cat([weight.w_scale[first:last] for weight, first, last in pieces])
    bias = None
    if pieces[0][0].bias is not None:
        bias = torch.cat([weight.bias[first:last] for weight, first, last in pieces])
    of_row = torch.cat(
        [
            weight.split.dense_width.repeat_interleave(TILE_ROWS)[first:last]
            for weight, first, last in pieces
        ]
    )
    width = torch.stack([rows.max() for rows in of_row.split(TILE_ROWS)])
    split = pieces[0][0].split
    return HybridWeight.from_dense(
        dense, w_scale, Split(len(dense), split.k, split.k_perm, width), bias
    )
