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
from spense_kernels.prune.obs import sweep, swept_losses
from spense_kernels.prune.order import (
    Problem,
    gather_order,
    inverse_diagonals,
    problem_scores,
    rank_columns,
)
from spense_kernels.prune.refit import refit
from spense_kernels.prune.widths import TILE_ROWS

# The losses only choose widths: less search than the prune itself gets.
_MOST = {"search_rounds": 15, "search_rows": 512, "admm_steps": 10, "refit_steps": 10}


def row_curves(
    problems: list[Problem],
    widths: list[int],
    config: PruneConfig,
    generators: list[torch.Generator],
) -> list[Tensor]:
    """Loss tr(e H e^T) of every row at every dense width: float64 [widths, sum N_i] a problem.

    `config.curves` says after which steps of a prune. Problems are of one shape; the last width
    must be the whole shard, which loses nothing.
    """
    curves = finished_curves if config.curves == "refit" else swept_curves
    return curves(problems, widths, config, generators)


def swept_curves(problems, widths, config: PruneConfig, generators) -> list[Tensor]:
    """`row_curves` of the swept rows, columns dealt like a snake in one order for all widths.

    Behind `config.curve_refit_steps` refit steps when those are asked for; the sweep counts the
    damping into its losses, the refit does not.
    """
    dense = stacked([problem.stacked() for problem in problems])
    orders = _snakes(problems, dense, widths, config, generators)
    size = dense.shape[2] // problems[0].k_shards
    out = torch.zeros(len(problems), len(widths), dense.shape[1], dtype=torch.float64)
    for pieces in pieces_alike(problems):
        hessian = stacked([permuted(piece.hessian, orders[piece.index]) for piece in pieces])
        names = [problems[piece.index].name for piece in pieces]
        factor, _ = damped_factors(hessian, config.damping, names)
        target = torch.stack([dense[p.index][p.rows][:, orders[p.index]] for p in pieces])
        starts = [problems[0].k_shards * (size - width) for width in widths]
        losses = _swept_losses(target, factor, hessian, starts, config).double().cpu()
        for b, piece in enumerate(pieces):
            out[piece.index, :, piece.rows] = losses[:, b]
    return list(out)


def _snakes(problems, dense: Tensor, widths, config: PruneConfig, generators) -> list[Tensor]:
    """Orders int64 [K] with nested shells of all widths, of weights [B, N, K]."""
    diagonals: list = [None] * len(problems)
    if config.score == "obs":
        diagonals, _ = inverse_diagonals(problems, config.damping)
    orders = []
    for job in zip(problems, dense, diagonals, generators, strict=True):
        problem, weight, diagonal, generator = job
        scores = problem_scores(problem, weight, config, diagonal, generator)
        ranked = rank_columns(scores, widths, problem.k_shards, "snake")
        orders.append(gather_order(ranked, widths))
    return orders


def _swept_losses(target, factor, hessian, starts: list[int], config: PruneConfig) -> Tensor:
    """float32 [starts, B, N] of targets [B, N, K], factors and Hessians [B, K, K]."""
    coupled, steps = config.mask == "pair", config.curve_refit_steps
    if not steps and all(start % 4 == 0 for start in starts):
        ascending = sorted(set(starts))
        found = swept_losses(target, factor, ascending, coupled=coupled)
        return torch.stack([found[ascending.index(start)] for start in starts])
    found = torch.zeros(len(starts), *target.shape[:2], device=target.device)
    for loss, start in zip(found, starts, strict=True):
        if start:
            swept = sweep(target, factor, start, coupled=coupled)
            loss.copy_(swept.row_loss)
            if steps:
                fitted = refit(swept.weight, target, swept.mask, hessian, steps, start)
                loss.copy_(row_losses(fitted - target, hessian))
    return found


def finished_curves(problems, widths, config: PruneConfig, generators) -> list[Tensor]:
    """`row_curves` of finished rows: order search, mask search and refit, without FP8.

    One prune a width. In each the tiles take all widths in turn, another one each time, so that
    the order of the columns is that of a staircase.
    """
    limits = {name: min(most, getattr(config, name)) for name, most in _MOST.items()}
    # Any fraction between 0 and 1: the widths are given.
    config = config.replace(fp8=False, dense_fraction=0.5, dense_order="last", **limits)
    size = sum(w.shape[0] for w in problems[0].weights)
    out = [torch.zeros(len(widths), size, dtype=torch.float64) for _ in problems]
    for turn in range(len(widths)):
        chosen, places = _turn(problems[0], widths, turn)
        trial = [dataclasses.replace(problem, widths=chosen) for problem in problems]
        for found, problem, solution in zip(
            out, problems, compress(trial, config, generators), strict=True
        ):
            error = torch.cat(solution.weights) - problem.stacked()
            lost = torch.cat([row_losses(error[rows], h) for rows, h in problem.parts])
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
