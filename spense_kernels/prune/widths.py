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
    sizes = [table.cost.shape[1] for table in tables]
    cost, weights = (_side_by_side([getattr(t, n) for t in tables]) for n in ("cost", "weights"))
    least = float(weights.min(dim=0).values.sum())
    if least > budget * (1 + 1e-9):
        raise PruneError(f"allocate: budget {budget:.0f} is below the least possible {least:.0f}")
    low, high = 0.0, 1.0
    while _spent(weights, choice := (cost + high * weights).argmin(dim=0)) > budget:
        high *= 4.0
        if high > 1e300:
            break
    for _ in range(200):
        middle = 0.5 * (low + high)
        candidate = (cost + middle * weights).argmin(dim=0)
        if _spent(weights, candidate) <= budget:
            high, choice = middle, candidate
        else:
            low = middle
    _fill(cost, weights, choice, budget - _spent(weights, choice))
    return list(choice.split(sizes))


def _side_by_side(tables: list[Tensor]) -> Tensor:
    """[widths, all tiles]; widths that a matrix does not have are beyond any budget."""
    most = max(len(table) for table in tables)
    pad = torch.nn.functional.pad
    return torch.cat([pad(t, (0, 0, 0, most - len(t)), value=torch.inf) for t in tables], dim=1)


def _spent(weights: Tensor, choice: Tensor) -> float:
    return float(weights.gather(0, choice[None]).sum())


def _fill(cost: Tensor, weights: Tensor, choice: Tensor, left: float) -> None:
    """Spend the rest: repeatedly the one-tile change of `choice`, in place, that saves most a
    weight and still fits."""
    while True:
        extra = weights - weights.gather(0, choice[None])
        saved = cost.gather(0, choice[None]) - cost
        rate = torch.where((extra > 0) & (extra <= left), saved / extra.clamp_min(1), -1.0)
        best = int(rate.argmax())
        width, tile = divmod(best, rate.shape[1])
        if not float(rate[width, tile]) > 0:
            return
        left -= float(extra[width, tile])
        choice[tile] = width
