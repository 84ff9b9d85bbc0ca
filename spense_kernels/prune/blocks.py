# SPDX-License-Identifier: Apache-2.0
"""Rows of several matrices that share one dense start, gathered so that they compute together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Block:
    """The rows whose first dense column is `start`, in the matrices that have any.

    Attributes:
        start: columns before it are sparse.
        which: int64 [b, 1] matrices.
        rows: int64 [b, R]; a matrix with fewer rows than R repeats its first.
        valid: bool [b, R], false where a row is repeated; None where none is.
    """

    start: int
    which: Tensor
    rows: Tensor
    valid: Tensor | None

    def take(self, values: Tensor) -> Tensor:
        """Rows of [B, N, ...]: [b, R, ...], a copy."""
        return values[self.which, self.rows]

    def put(self, out: Tensor, found: Tensor) -> None:
        """Write [b, R, C] into the first C columns of the rows of `out` [B, N, K]."""
        which, rows = self.which.expand_as(self.rows), self.rows
        if self.valid is not None:
            which, rows, found = which[self.valid], rows[self.valid], found[self.valid]
        out[..., : found.shape[-1]][which, rows] = found

    def of(self, matrices: Tensor) -> Tensor:
        """[B, ...] of the matrices that have such rows: [b, ...]."""
        return matrices if len(self.which) == len(matrices) else matrices[self.which[:, 0]]


def blocks(starts: Tensor) -> list[Block]:
    """Blocks of all starts, ascending.

    Args:
        starts: int64 [B, N] first dense column of every row; the blocks are on its device.
    """
    device, starts = starts.device, starts.cpu()
    found = []
    for start in starts.unique().tolist():
        rows = [(of_one == start).nonzero().flatten() for of_one in starts]
        which = [i for i, of_one in enumerate(rows) if len(of_one)]
        counts = torch.tensor([len(rows[i]) for i in which])
        padded = torch.stack([_padded(rows[i], int(counts.max())) for i in which])
        valid = None
        if not bool((counts == counts.max()).all()):
            valid = (torch.arange(padded.shape[1]) < counts[:, None]).to(device)
        found.append(
            Block(start, torch.tensor(which, device=device)[:, None], padded.to(device), valid)
        )
    return found


def _padded(rows: Tensor, size: int) -> Tensor:
    return torch.cat([rows, rows[:1].expand(size - len(rows))])


def stacked(tensors: list[Tensor]) -> Tensor:
    """torch.stack that copies nothing when there is one: Hessians of one layer can be large."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
