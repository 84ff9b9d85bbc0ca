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


def compress(
    problems: list[Problem], config: PruneConfig, generators: list[torch.Generator]
) -> list[Solution]:
    """Prune groups of projections by the settings; see docs/pruning.md for the method.

    Problems of equal shape (the same group in several layers) share the sweeps, which on a GPU
    costs little more than one of them alone.
    """
    jobs = [_start(*pair, config) for pair in zip(problems, generators, strict=True)]
    if config.method == "obs":
        _sweep_all([job for job in jobs if not job.done], config)
    else:
        for job in jobs:
            _mask_only(job, config)
    return [_finish(job, config) for job in jobs]


@dataclass
class _Job:
    """A problem on its way.

    dense: [N, K] stacked weights, dead inputs cleared; starts: int64 [N] first dense place of each
    row in `order`; pruned: float32 [N, K] result; done: nothing left to prune.
    """

    problem: Problem
    original: Tensor
    dense: Tensor
    starts: Tensor
    damping: float
    k_perm: Tensor
    order: Tensor
    done: bool
    pruned: Tensor
    scale: Tensor | None = None


def _start(problem: Problem, generator: torch.Generator, config: PruneConfig) -> _Job:
    original = torch.cat([w.float() for w in problem.weights])
    starts = _dense_starts(problem)
    dense = torch.where(dead_inputs(problem.hessian), 0.0, original)
    k_perm, damping = _identity(problem), config.damping
    done = config.dense_fraction == 1.0 or int(starts.max()) == 0
    if not done:
        k_perm, damping = choose_order(problem, dense, starts, config, generator)
    order = gather_order(k_perm, _distinct(problem))
    return _Job(problem, original, dense, starts, damping, k_perm, order, done, original)


def _finish(job: _Job, config: PruneConfig) -> Solution:
    problem, original = job.problem, job.original
    if job.done and config.fp8:  # nothing is sparse: plain FP8 rounding
        job.scale = fp8_scale(original)
        job.pruned = round_to_fp8(original, job.scale[:, None])
    error, energy = _errors(job.pruned - original, original, problem.hessian)
    sizes = [w.shape[0] for w in problem.weights]
    ratios = [
        float(e.sum() / s.sum().clamp_min(1e-30))
        for e, s in zip(error.split(sizes), energy.split(sizes), strict=True)
    ]
    scales = None if job.scale is None else list(job.scale.split(sizes))
    return Solution(job.k_perm.cpu(), list(job.pruned.split(sizes)), scales, ratios, job.damping)


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


def _sweep_all(jobs: list[_Job], config: PruneConfig) -> None:
    """OBS sweep, refit and FP8 of jobs of one shape."""
    if not jobs:
        return
    first = 0
    orders, starts = [job.order for job in jobs], [job.starts for job in jobs]
    if config.dense_order == "first":
        k, start = orders[0].shape[0], int(starts[0][0])
        first = k - start
        orders = [torch.cat([order[start:], order[:start]]) for order in orders]
        starts = [torch.full_like(s, k) for s in starts]
    hessians = [permuted(j.problem.hessian, o) for j, o in zip(jobs, orders, strict=True)]
    factors = []
    for job, hessian in zip(jobs, hessians, strict=True):
        _, factor, job.damping = damped_factor(hessian, job.damping, job.problem.name)
        factors.append(factor)
    factor, start = torch.stack(factors), torch.stack(starts)
    target = torch.stack([j.dense[:, o] for j, o in zip(jobs, orders, strict=True)])
    swept = sweep(target, factor, start, sparse_start=first, coupled=config.mask == "pair")
    weight = torch.cat([
        refit(
            swept.weight[i : i + 1], target[i : i + 1], swept.mask[i : i + 1], hessian[None],
            config.refit_steps, starts[i],
        )
        for i, hessian in enumerate(hessians)
    ])  # fmt: skip
    if config.fp8:
        scale = fp8_scale(weight)
        if config.fp8_feedback:
            weight = sweep(weight, factor, start, mask=swept.mask, scale=scale).weight
        else:
            weight = round_to_fp8(weight, scale[..., None])
    for i, job in enumerate(jobs):
        job.pruned = _restore(weight[i], orders[i])
        job.scale = scale[i] if config.fp8 else None


def _mask_only(job: _Job, config: PruneConfig) -> None:
    """Baselines without compensation: the mask by saliency, kept weights untouched."""
    if job.done:
        return
    saliency = weight_saliency(config.method, job.dense, job.problem.hessian)[:, job.order]
    keep = torch.ones_like(saliency, dtype=torch.bool)
    for start in job.starts.unique().tolist():
        rows = job.starts == start
        keep[rows, :start] = top2_mask(saliency[rows, :start]) if start else True
    weight = _restore(job.dense[:, job.order] * keep, job.order)
    if config.fp8:
        job.scale = fp8_scale(weight)
        weight = round_to_fp8(weight, job.scale[:, None])
    job.pruned = weight


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
