# SPDX-License-Identifier: Apache-2.0
"""What a group of projections is, and the order of its columns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from spense_kernels.prune.blocks import stacked
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.hessian import damped_factors, dead_inputs
from spense_kernels.prune.permute import search, snake
from spense_kernels.prune.saliency import column_scores, inverse_diagonal, weight_saliency
from spense_kernels.prune.widths import TILE_ROWS


@dataclass
class Problem:
    """What pruning one group of projections needs.

    Attributes:
        name: for messages.
        weights: [N_i, K] each, one device.
        hessian: float32 [K, K], symmetric, undamped; one for all, or a list with one each.
        widths: int64 [ceil(N_i / 128)] each: dense columns of a shard, a tile.
        k_shards: shards of K.
        row_weights: float32 [N_i] each: how much an output's error matters; None for equal.
        k_perm: int32 [k_shards, K / k_shards] order of the columns, or None to choose one.
    """

    name: str
    weights: list[Tensor]
    hessian: Tensor | list[Tensor]
    widths: list[Tensor]
    k_shards: int = 1
    row_weights: list[Tensor] | None = None
    k_perm: Tensor | None = None

    @property
    def parts(self) -> list[tuple[slice, Tensor]]:
        """Rows of the stacked weights, and the Hessian that holds for them."""
        n = sum(w.shape[0] for w in self.weights)
        if isinstance(self.hessian, Tensor):
            return [(slice(0, n), self.hessian)]
        found, first = [], 0
        for weight, hessian in zip(self.weights, self.hessian, strict=True):
            last = first + weight.shape[0]
            found.append((slice(first, last), hessian))
            first = last
        return found

    @property
    def dead(self) -> Tensor:
        """bool [K]: inputs that were zero in every calibration token."""
        dead = [dead_inputs(hessian) for _, hessian in self.parts]
        return torch.stack(dead).all(dim=0)

    @property
    def k(self) -> int:
        return self.weights[0].shape[1]

    def stacked(self) -> Tensor:
        """float32 [N, K], dead inputs cleared."""
        weights = torch.cat([w.float() for w in self.weights])
        return torch.where(self.dead, 0.0, weights)

    def rows(self) -> Tensor | None:
        """float32 [N, 1] of row_weights."""
        return None if self.row_weights is None else torch.cat(self.row_weights)[:, None]


def inverse_diagonals(
    problems: list[Problem], damping: float
) -> tuple[list[list[Tensor]], list[float]]:
    """diag(H^-1) float32 [K] of every part of every problem (all of one K), and the largest
    damping that each problem needed."""
    parts = [(problem.name, hessian) for problem in problems for _, hessian in problem.parts]
    names, hessians = zip(*parts, strict=True)
    factor, used = damped_factors(stacked(list(hessians)), damping, list(names))
    diagonals, found, largest = iter(inverse_diagonal(factor)), [], []
    dampings = iter(used)
    for problem in problems:
        found.append([next(diagonals) for _ in problem.parts])
        largest.append(max(next(dampings) for _ in problem.parts))
    return found, largest


def problem_scores(problem: Problem, dense: Tensor, config: PruneConfig, diagonals, generator):
    """Column scores [K], summed over the parts."""
    if config.score == "random":
        return column_scores("random", dense, problem.parts[0][1], None, generator)
    total = 0.0
    for i, (rows, hessian) in enumerate(problem.parts):
        diagonal = None if diagonals is None else diagonals[i]
        total = total + column_scores(config.score, dense[rows], hessian, diagonal, generator)
    return total


def choose_orders(
    problems: list[Problem],
    dense: list[Tensor],
    starts: list[Tensor],
    config: PruneConfig,
    generators: list[torch.Generator],
) -> tuple[list[Tensor], list[float]]:
    """Orders of the columns in every shard, int32 [k_shards, K / k_shards], and dampings used.

    Problems are of one shape; `dense` are their stacked weights, `starts` the first dense column of
    every row. Columns are ranked by `config.score`; the shells between the widths in use are taken
    from that ranking and ordered inside by `config.permutation`.
    """
    dampings = [config.damping] * len(problems)
    diagonals: list = [None] * len(problems)
    if config.score == "obs" or (config.permutation == "search" and config.method == "obs"):
        diagonals, dampings = inverse_diagonals(problems, config.damping)
    k_perms = []
    for problem, weight, diagonal, generator in zip(
        problems, dense, diagonals, generators, strict=True
    ):
        scores = problem_scores(problem, weight, config, diagonal, generator)
        widths = distinct_widths(problem)
        k_perms.append(rank_columns(scores, widths, problem.k_shards, config.permutation))
    if config.permutation != "search":
        return k_perms, dampings
    orders = [gather_order(k, distinct_widths(p)) for k, p in zip(k_perms, problems, strict=True)]
    saliencies = [
        _saliency(*job, config)
        for job in zip(problems, dense, starts, orders, diagonals, strict=True)
    ]
    segments = [_segments(problem) for problem in problems]
    found = search(saliencies, segments, config.search_rounds, generators)
    return [
        _shard_order(order[moved], k_perm, distinct_widths(problem))
        for order, moved, k_perm, problem in zip(orders, found, k_perms, problems, strict=True)
    ], dampings


def _saliency(problem, dense, starts, order, diagonals, config: PruneConfig) -> Tensor:
    """float32 [search_rows, K] in the given order, zero where a row is dense.

    The rows with most to lose decide: they generalise far better than a random sample.
    """
    saliency = torch.cat([
        weight_saliency(
            config.method, dense[rows], hessian, None if diagonals is None else diagonals[i]
        )
        for i, (rows, hessian) in enumerate(problem.parts)
    ])  # fmt: skip
    if problem.row_weights is not None:
        saliency = saliency * problem.rows()
    positions = torch.arange(order.shape[0], device=order.device)
    saliency = saliency[:, order] * (positions < starts[:, None])
    rows = saliency.sum(dim=1).topk(min(config.search_rows, saliency.shape[0])).indices
    return saliency[rows]


def rank_columns(scores: Tensor, widths: list[int], k_shards: int, permutation: str) -> Tensor:
    """Shard-relative order by score: shells from the least to the most important.

    Args:
        scores: [K].
        widths: distinct dense widths of a shard in use, any order.

    Inside a shell columns are dealt like a snake, or stay in place for permutation "none".
    Returns int32 [k_shards, K / k_shards].
    """
    size = scores.shape[0] // k_shards
    bounds = _bounds(widths, size)
    out = []
    for shard in scores.view(k_shards, size):
        ascending = shard.argsort(stable=True)
        parts = []
        for a, b in itertools.pairwise(bounds):
            shell = ascending[a:b]
            parts.append(shell.sort().values if permutation == "none" else snake(shell.flip(0)))
        out.append(torch.cat(parts))
    return torch.stack(out).to(torch.int32)


def gather_order(k_perm: Tensor, widths: list[int]) -> Tensor:
    """int64 [K]: absolute columns shell by shell and, inside a shell, shard by shard."""
    shards, size = k_perm.shape
    offset = torch.arange(shards, device=k_perm.device)[:, None] * size
    absolute = k_perm.long() + offset
    cuts = itertools.pairwise(_bounds(widths, size))
    return torch.cat([absolute[:, a:b].reshape(-1) for a, b in cuts])


def distinct_widths(problem: Problem) -> list[int]:
    return sorted({int(w) for widths in problem.widths for w in widths.tolist()})


def dense_starts(problem: Problem) -> Tensor:
    """int64 [sum N_i]: first dense position of every row in the gather order."""
    size = problem.k // problem.k_shards
    parts = []
    for weight, widths in zip(problem.weights, problem.widths, strict=True):
        rows = widths.repeat_interleave(TILE_ROWS)[: weight.shape[0]]
        parts.append(problem.k_shards * (size - rows))
    return torch.cat(parts).to(problem.weights[0].device)


def _bounds(widths: list[int], size: int) -> list[int]:
    return sorted({0, size, *(size - w for w in widths)})


def _segments(problem: Problem) -> list[tuple[int, int]]:
    """Ranges of the gather order that groups may not leave: one a shell and shard."""
    size = problem.k // problem.k_shards
    widths = distinct_widths(problem)
    out, place = [], 0
    for a, b in itertools.pairwise(_bounds(widths, size)):
        for _ in range(problem.k_shards):
            if a < size - min(widths):
                out.append((place, place + b - a))
            place += b - a
    return out


def _shard_order(order: Tensor, like: Tensor, widths: list[int]) -> Tensor:
    """Inverse of `gather_order`."""
    shards, size = like.shape
    place = 0
    out = torch.empty(shards, size, dtype=torch.int64, device=order.device)
    for a, b in itertools.pairwise(_bounds(widths, size)):
        for shard in range(shards):
            out[shard, a:b] = order[place : place + b - a] - shard * size
            place += b - a
    return out.to(torch.int32)
