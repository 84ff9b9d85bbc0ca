# SPDX-License-Identifier: Apache-2.0
"""Row losses at every dense width after all that a prune does, FP8 aside."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from spense_kernels.prune.compress import compress
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.order import Problem
from spense_kernels.prune.widths import TILE_ROWS

# The losses only choose widths: less search than the prune itself gets.
_MOST = {"search_rounds": 15, "search_rows": 512, "admm_steps": 10, "refit_steps": 10}


def finished_curves(
    problems: list[Problem],
    widths: list[int],
    config: PruneConfig,
    generators: list[torch.Generator],
) -> list[Tensor]:
    """Loss tr(e H e^T) of every row at every width: float64 [widths, sum N_i] of each problem.

    One prune a width, with order search, mask search and refit. In each the tiles take all widths
    in turn, another one each time, so that the order of the columns is that of a staircase.
    Arguments as in `row_curves`; the last width must be the whole shard, which loses nothing.
    """
    limits = {name: min(most, getattr(config, name)) for name, most in _MOST.items()}
    # Any fraction between 0 and 1: the widths are given.
    config = config.replace(fp8=False, dense_fraction=0.5, dense_order="last", **limits)
    rows = sum(w.shape[0] for w in problems[0].weights)
    out = [torch.zeros(len(widths), rows, dtype=torch.float64) for _ in problems]
    for turn in range(len(widths)):
        chosen, places = _turn(problems[0], widths, turn)
        trial = [dataclasses.replace(problem, widths=chosen) for problem in problems]
        for found, problem, solution in zip(
            out, problems, compress(trial, config, generators), strict=True
        ):
            error = torch.cat(list(solution.weights)) - problem.stacked()
            lost = torch.cat([((error[r] @ h) * error[r]).sum(dim=1) for r, h in problem.parts])
            found.scatter_(0, places[None], lost[None].double().cpu())
    for found in out:
        found[-1] = 0.0
    return out


def _turn(problem: Problem, widths: list[int], turn: int) -> tuple[list[Tensor], Tensor]:
    """Widths of every tile in this turn, and int64 [sum N_i]: which of `widths` each row has."""
    chosen, places, tile = [], [], turn
    for weight in problem.weights:
        tiles = -(-weight.shape[0] // TILE_ROWS)
        pick = (torch.arange(tiles) + tile) % len(widths)
        tile += tiles
        chosen.append(torch.tensor(widths)[pick])
        places.append(pick.repeat_interleave(TILE_ROWS)[: weight.shape[0]])
    return chosen, torch.cat(places)
