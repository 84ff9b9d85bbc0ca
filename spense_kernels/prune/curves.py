# SPDX-License-Identifier: Apache-2.0
"""What every row of a projection would lose at every dense width, before widths are chosen."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from spense_kernels.prune.blocks import stacked
from spense_kernels.prune.compress import compress, pieces_alike, row_losses
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.hessian import damped_factors, permuted
from spense_kernels.prune.obs import sweep
from spense_kernels.prune.order import (
    Problem,
    gather_order,
    inverse_diagonals,
    problem_scores,
    rank_columns,
)
from spense_kernels.prune.widths import TILE_ROWS

# What the losses of finished rows are worked out with, at most: they only rank widths.
_CHEAPER = {"search_rounds": 15, "search_rows": 512, "admm_steps": 10, "refit_steps": 10}


def row_curves(
    problems: list[Problem],
    widths: list[int],
    config: PruneConfig,
    generators: list[torch.Generator],
) -> list[Tensor]:
    """Loss tr(e H e^T) of every row at every dense width: float64 [widths, sum N_i] a problem.

    One order (nested shells of all widths) serves all; the last width must be the whole shard,
    which loses nothing. Problems are of one shape. `config.curves` says which rows are meant.
    """
    if config.curves == "sweep":
        return _swept_rows(problems, widths, config, generators)
    return _finished_rows(problems, widths, config, generators)


def _finished_rows(problems, widths, config: PruneConfig, generators) -> list[Tensor]:
    """Rows behind the order search, the mask search and the refit, before FP8.

    A row goes through the pruner once at every width but the last. Tiles differ in width each time,
    as they will in the end, because the search for an order sees all rows of a group.
    """
    changes = {name: min(most, getattr(config, name)) for name, most in _CHEAPER.items()}
    config = config.replace(**changes, fp8=False)
    rows = sum(w.shape[0] for w in problems[0].weights)
    out = [torch.zeros(len(widths), rows, dtype=torch.float64) for _ in problems]
    turns = len(widths) - 1
    tiles = [-(-w.shape[0] // TILE_ROWS) for w in problems[0].weights]
    sizes = [w.shape[0] for w in problems[0].weights]
    for turn in range(turns):
        picks = ((torch.arange(sum(tiles)) + turn) % turns).split(tiles)
        chosen = [torch.tensor(widths)[pick] for pick in picks]
        index = torch.cat([
            pick.repeat_interleave(TILE_ROWS)[:size]
            for pick, size in zip(picks, sizes, strict=True)
        ])  # fmt: skip
        trial = [dataclasses.replace(problem, widths=chosen) for problem in problems]
        solutions = compress(trial, config, generators)
        for losses, problem, solution in zip(out, problems, solutions, strict=True):
            error = torch.cat(solution.weights) - problem.stacked()
            found = torch.cat([row_losses(error[part], h) for part, h in problem.parts])
            losses.scatter_(0, index[None], found.double().cpu()[None])
    return out


def _swept_rows(problems, widths, config: PruneConfig, generators) -> list[Tensor]:
    """Rows behind the sweep alone, columns dealt like a snake; H damped."""
    dense = stacked([problem.stacked() for problem in problems])
    diagonals: list = [None] * len(problems)
    if config.score == "obs":
        diagonals, _ = inverse_diagonals(problems, config.damping)
    orders = []
    for job in zip(problems, dense, diagonals, generators, strict=True):
        problem, weight, diagonal, generator = job
        scores = problem_scores(problem, weight, config, diagonal, generator)
        ranked = rank_columns(scores, widths, problem.k_shards, "snake")
        orders.append(gather_order(ranked, widths))
    size = dense.shape[2] // problems[0].k_shards
    out = torch.zeros(len(problems), len(widths), dense.shape[1], dtype=torch.float64)
    for pieces in pieces_alike(problems):
        hessian = stacked([permuted(piece.hessian, orders[piece.index]) for piece in pieces])
        names = [problems[piece.index].name for piece in pieces]
        factor, _ = damped_factors(hessian, config.damping, names)
        target = torch.stack([dense[p.index][p.rows][:, orders[p.index]] for p in pieces])
        for i, width in enumerate(widths):
            start = problems[0].k_shards * (size - width)
            if start:
                swept = sweep(target, factor, start, coupled=config.mask == "pair")
                for piece, lost in zip(pieces, swept.row_loss.double().cpu(), strict=True):
                    out[piece.index, i, piece.rows] = lost
    return list(out)
