# SPDX-License-Identifier: Apache-2.0
"""How many columns stay dense: one width for a layer, or one per tile under a common budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spense_kernels.errors import PruneError

GRANULE = 16
TILE_ROWS = 128


def round_width(share: float, columns: int) -> int:
    """Dense columns of a shard of `columns` for a share: the nearest legal width, halves up.

    Legal are multiples of 16 and the whole shard, as in `Split.from_fraction`.
    """
    target = share * columns
    below = int(target) // GRANULE * GRANULE
    above = min(below + GRANULE, columns)
    return above if target - below >= above - target else below


def width_list(shares, columns: int) -> list[int]:
    """Distinct legal widths for the shares, ascending."""
    return sorted({round_width(share, columns) for share in shares})


def tile_sums(rows: Tensor) -> Tensor:
    """Sum over each 128-row tile: [..., N] -> [..., ceil(N / 128)]."""
    n = rows.shape[-1]
    padded = torch.nn.functional.pad(rows, (0, -n % TILE_ROWS))
    return padded.unflatten(-1, (-1, TILE_ROWS)).sum(dim=-1)


@dataclass
class TileCosts:
    """What each tile of one matrix loses at each allowed width.

    Attributes:
        cost: float64 [widths, tiles], non-negative; the last width is fully dense and costs 0.
        weights: float64 [widths, tiles], dense weights that this choice keeps.
    """

    cost: Tensor
    weights: Tensor


def allocate(tables: list[TileCosts], budget: float) -> list[Tensor]:
    """Choose a width for every tile: least total cost with at most `budget` dense weights.

    One Lagrange multiplier over all tables, found by bisection; what is left of the budget then
    goes to single tiles, the best saving a weight first.

    Returns int64 [tiles] of indices into the widths, for each table.

    Raises PruneError when even the cheapest choice exceeds the budget.
    """
    least = sum(float(t.weights.min(dim=0).values.sum()) for t in tables)
    if least > budget * (1 + 1e-9):
        raise PruneError(f"allocate: budget {budget:.0f} is below the least possible {least:.0f}")
    low, high = 0.0, 1.0
    while _spent(tables, choice := _choose(tables, high)) > budget:
        high *= 4.0
        if high > 1e300:
            break
    for _ in range(200):
        middle = 0.5 * (low + high)
        if _spent(tables, candidate := _choose(tables, middle)) <= budget:
            high, choice = middle, candidate
        else:
            low = middle
    return _fill(tables, choice, budget - _spent(tables, choice))


def _choose(tables, multiplier: float) -> list[Tensor]:
    return [(t.cost + multiplier * t.weights).argmin(dim=0) for t in tables]


def _spent(tables, choice) -> float:
    return sum(
        float(t.weights.gather(0, c[None]).sum()) for t, c in zip(tables, choice, strict=True)
    )


def _fill(tables, choice, left: float) -> list[Tensor]:
    """Spend the rest: repeatedly the one-tile change that saves most a weight and still fits."""
    while True:
        best = None
        for i, (table, chosen) in enumerate(zip(tables, choice, strict=True)):
            extra = table.weights - table.weights.gather(0, chosen[None])
            saved = table.cost.gather(0, chosen[None]) - table.cost
            rate = torch.where((extra > 0) & (extra <= left), saved / extra.clamp_min(1), -1.0)
            top = rate.max()
            if top > 0 and (best is None or top > best[0]):
                best = (float(top), i, int(rate.argmax()))
        if best is None:
            return choice
        _, i, flat = best
        width, tile = divmod(flat, choice[i].shape[0])
        left -= float(tables[i].weights[width, tile] - tables[i].weights[choice[i][tile], tile])
        choice[i][tile] = width
