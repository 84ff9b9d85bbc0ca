# SPDX-License-Identifier: Apache-2.0
"""Prune the projections that share one input: order, mask, compensation, refit, FP8.

Pure tensor functions; everything runs on the device of the weights.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.hessian import damped_factor, dead_inputs, permuted
from spense_kernels.prune.mask import top2_mask
from spense_kernels.prune.obs import FP8_MAX, round_to_fp8, sweep
from spense_kernels.prune.permute import search, snake
from spense_kernels.prune.refit import refit
from spense_kernels.prune.saliency import column_scores, inverse_diagonal, weight_saliency
from spense_kernels.prune.widths import TILE_ROWS

_AMAX_FLOOR = 1e-12


@dataclass
class Problem:
    """What pruning one group of projections needs.

    Attributes:
        name: for messages.
        weights: [N_i, K] each, one device.
        hessian: float32 [K, K], symmetric, undamped.
        widths: int64 [ceil(N_i / 128)] each: dense columns of a shard, a tile.
        k_shards: shards of K.
        row_weights: float32 [N_i] each: how much an output's error matters; None for equal.
    """

    name: str
    weights: list[Tensor]
    hessian: Tensor
    widths: list[Tensor]
    k_shards: int = 1
    row_weights: list[Tensor] | None = None


@dataclass
class Solution:
    """Pruned projections.

    Attributes:
        k_perm: int32 [k_shards, K / k_shards] shared by all.
        weights: float32 [N_i, K] each, original column order, zeros where pruned; with FP8 exact
            multiples fp8 * scale.
        scales: float32 [N_i] each, or None without FP8.
        errors: tr(E H E^T) / tr(W H W^T) each.
        damping: what made H positive definite.
    """

    k_perm: Tensor
    weights: list[Tensor]
    scales: list[Tensor] | None
    errors: list[float]
    damping: float


def compress(problem: Problem, config: PruneConfig, generator: torch.Generator) -> Solution:
    """Prune one group of projections by the settings; see docs/pruning.md for the method."""
    original = torch.cat([w.float() for w in problem.weights])
    starts = _dense_starts(problem)
    dense = torch.where(dead_inputs(problem.hessian), 0.0, original)
    damping = config.damping
    plain_fp8 = config.dense_fraction == 1.0 or starts.max() == 0
    if plain_fp8:
        k_perm = _identity(problem)
        pruned, scale = original, None
        if config.fp8:
            scale = fp8_scale(original)
            pruned = round_to_fp8(original, scale[:, None])
    else:
        k_perm, damping = choose_order(problem, dense, starts, config, generator)
        order = gather_order(k_perm, _distinct(problem))
        solve = _solve_obs if config.method == "obs" else _solve_mask
        pruned, scale, damping = solve(problem, dense, starts, order, config, damping)
    error, energy = _errors(pruned - original, original, problem.hessian)
    sizes = [w.shape[0] for w in problem.weights]
    ratios = [
        float(e.sum() / s.sum().clamp_min(1e-30))
        for e, s in zip(error.split(sizes), energy.split(sizes), strict=True)
    ]
    scales = None if scale is None else list(scale.split(sizes))
    return Solution(k_perm.cpu(), list(pruned.split(sizes)), scales, ratios, damping)


def fp8_scale(weight: Tensor) -> Tensor:
    """float32 [N]: largest magnitude of each row over 448, never zero."""
    return weight.abs().amax(dim=-1).clamp_min(_AMAX_FLOOR) / FP8_MAX


def choose_order(
    problem: Problem, dense: Tensor, starts: Tensor, config: PruneConfig, generator
) -> tuple[Tensor, float]:
    """Order of the columns in every shard: int32 [k_shards, K / k_shards], and the damping used.

    Columns are ranked by `config.score`; the shells between the widths in use are taken from that
    ranking and ordered inside by `config.permutation`.
    """
    hessian, damping, inverse_diag = problem.hessian, config.damping, None
    searching = config.permutation == "search" and config.method == "obs"
    if config.score == "obs" or searching:
        _, factor, damping = damped_factor(hessian, damping, problem.name)
        inverse_diag = inverse_diagonal(factor)
        del factor
    scores = column_scores(config.score, dense, hessian, inverse_diag, generator)
    k_perm = rank_columns(scores, _distinct(problem), problem.k_shards, config.permutation)
    if config.permutation == "search":
        order = gather_order(k_perm, _distinct(problem))
        saliency = weight_saliency(config.method, dense, hessian, inverse_diag)
        if problem.row_weights is not None:
            saliency = saliency * torch.cat(problem.row_weights)[:, None]
        positions = torch.arange(order.shape[0], device=order.device)
        saliency = saliency[:, order] * (positions < starts[:, None])
        # The rows with most to lose decide: they generalise far better than a random sample.
        rows = saliency.sum(dim=1).topk(min(config.search_rows, saliency.shape[0])).indices
        saliency = saliency[rows]
        found = search(saliency, _segments(problem), config.search_rounds, generator)
        k_perm = _shard_order(order[found], k_perm, _distinct(problem))
    return k_perm, damping


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
    bounds = _bounds(widths, size)
    cuts = itertools.pairwise(bounds)
    return torch.cat([absolute[:, a:b].reshape(-1) for a, b in cuts])


def row_curves(
    problem: Problem, widths: list[int], config: PruneConfig, generator: torch.Generator
) -> Tensor:
    """Second-order loss of every row at every dense width: float64 [widths, sum N_i].

    One order (nested shells of all widths) serves all; the last width must be the whole shard,
    which loses nothing.
    """
    dense = torch.cat([w.float() for w in problem.weights])
    dense = torch.where(dead_inputs(problem.hessian), 0.0, dense)
    diag = None
    if config.score == "obs":
        diag = inverse_diagonal(damped_factor(problem.hessian, config.damping, problem.name)[1])
    scores = column_scores(config.score, dense, problem.hessian, diag, generator)
    order = gather_order(rank_columns(scores, widths, problem.k_shards, "snake"), widths)
    hessian = permuted(problem.hessian, order)
    _, factor, _ = damped_factor(hessian, config.damping, problem.name)
    size = dense.shape[1] // problem.k_shards
    losses = []
    for width in widths:
        start = problem.k_shards * (size - width)
        if start == 0:
            losses.append(torch.zeros(dense.shape[0], device=dense.device))
            continue
        swept = sweep(dense[None][..., order], factor[None], start, coupled=config.mask == "pair")
        losses.append(swept.row_loss[0])
    return torch.stack(losses).double()


def _solve_obs(problem, dense, starts, order, config, damping):
    sweep_order, first = order, 0
    if config.dense_order == "first":
        start = int(starts[0])
        sweep_order, first = torch.cat([order[start:], order[:start]]), order.shape[0] - start
        starts = torch.full_like(starts, order.shape[0])
    hessian = permuted(problem.hessian, sweep_order)
    _, factor, damping = damped_factor(hessian, damping, problem.name)
    factor, hessian = factor[None], hessian[None]
    target = dense[None][..., sweep_order]
    swept = sweep(target, factor, starts, sparse_start=first, coupled=config.mask == "pair")
    weight = refit(swept.weight, target, swept.mask, hessian, config.refit_steps, starts)
    scale = None
    if config.fp8:
        scale = fp8_scale(weight)
        if config.fp8_feedback:
            weight = sweep(weight, factor, starts, mask=swept.mask, scale=scale).weight
        else:
            weight = round_to_fp8(weight, scale[..., None])
        scale = scale[0]
    return _restore(weight[0], sweep_order), scale, damping


def _solve_mask(problem, dense, starts, order, config, damping):
    """Baselines without compensation: the mask by saliency, kept weights untouched."""
    saliency = weight_saliency(config.method, dense, problem.hessian)[:, order]
    k = order.shape[0]
    keep = torch.ones_like(saliency, dtype=torch.bool)
    for start in starts.unique().tolist():
        rows = starts == start
        keep[rows, :start] = top2_mask(saliency[rows, :start]) if start else True
    weight = _restore(dense[:, order] * keep, order)
    scale = None
    if config.fp8:
        scale = fp8_scale(weight)
        weight = round_to_fp8(weight, scale[:, None])
    assert weight.shape[1] == k
    return weight, scale, damping


def _restore(weight: Tensor, order: Tensor) -> Tensor:
    out = torch.empty_like(weight)
    out[:, order] = weight
    return out


def _errors(error: Tensor, weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    lost = ((error @ hessian) * error).sum(dim=1).double()
    return lost, ((weight @ hessian) * weight).sum(dim=1).double()


def _identity(problem: Problem) -> Tensor:
    size = problem.hessian.shape[0] // problem.k_shards
    return torch.arange(size, dtype=torch.int32).repeat(problem.k_shards, 1)


def _distinct(problem: Problem) -> list[int]:
    return sorted({int(w) for widths in problem.widths for w in widths.tolist()})


def _bounds(widths: list[int], size: int) -> list[int]:
    return sorted({0, size, *(size - w for w in widths)})


def _segments(problem: Problem) -> list[tuple[int, int]]:
    """Ranges of the gather order that groups may not leave: one a shell and shard."""
    size = problem.hessian.shape[0] // problem.k_shards
    bounds, out, place = _bounds(_distinct(problem), size), [], 0
    least_dense = min(_distinct(problem))
    for a, b in itertools.pairwise(bounds):
        for _ in range(problem.k_shards):
            if a < size - least_dense:
                out.append((place, place + b - a))
            place += b - a
    return out


def _shard_order(order: Tensor, like: Tensor, widths: list[int]) -> Tensor:
    """Inverse of `gather_order`."""
    shards, size = like.shape
    bounds, place = _bounds(widths, size), 0
    out = torch.empty(shards, size, dtype=torch.int64, device=order.device)
    for a, b in itertools.pairwise(bounds):
        for shard in range(shards):
            out[shard, a:b] = order[place : place + b - a] - shard * size
            place += b - a
    return out.to(torch.int32)


def _dense_starts(problem: Problem) -> Tensor:
    """int64 [sum N_i]: first dense position of every row in the gather order."""
    size = problem.hessian.shape[0] // problem.k_shards
    parts = []
    for weight, widths in zip(problem.weights, problem.widths, strict=True):
        rows = widths.repeat_interleave(TILE_ROWS)[: weight.shape[0]]
        parts.append(problem.k_shards * (size - rows))
    return torch.cat(parts).to(problem.hessian.device)
