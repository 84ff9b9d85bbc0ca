# SPDX-License-Identifier: Apache-2.0
"""Prune the projections that share one input: order, mask, compensation, refit, FP8.

Pure tensor functions; everything runs on the device of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spense_kernels.prune.admm import search_mask
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.hessian import damped_factor, permuted
from spense_kernels.prune.mask import top2_mask
from spense_kernels.prune.obs import FP8_MAX, round_to_fp8, sweep
from spense_kernels.prune.order import (
    Problem,
    choose_order,
    dense_starts,
    distinct_widths,
    gather_order,
    inverse_diagonals,
    problem_scores,
    rank_columns,
)
from spense_kernels.prune.refit import refit
from spense_kernels.prune.saliency import weight_saliency

_AMAX_FLOOR = 1e-12


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
    starts = dense_starts(problem)
    dense = problem.stacked()
    k_perm, damping = _identity(problem), config.damping
    done = config.dense_fraction == 1.0 or int(starts.max()) == 0
    if not done:
        k_perm, damping = choose_order(problem, dense, starts, config, generator)
    order = gather_order(k_perm, distinct_widths(problem))
    return _Job(problem, original, dense, starts, damping, k_perm, order, done, original.clone())


def _finish(job: _Job, config: PruneConfig) -> Solution:
    problem, original = job.problem, job.original
    if job.done and config.fp8:  # nothing is sparse: plain FP8 rounding
        job.scale = fp8_scale(original)
        job.pruned = round_to_fp8(original, job.scale[:, None])
    sizes = [w.shape[0] for w in problem.weights]
    error, energy = torch.empty(len(original)).double(), torch.empty(len(original)).double()
    for rows, hessian in problem.parts:
        lost, whole = _errors(job.pruned[rows] - original[rows], original[rows], hessian)
        error[rows], energy[rows] = lost.cpu(), whole.cpu()
    ratios = [
        float(e.sum() / s.sum().clamp_min(1e-30))
        for e, s in zip(error.split(sizes), energy.split(sizes), strict=True)
    ]
    scales = None if job.scale is None else list(job.scale.split(sizes))
    return Solution(job.k_perm.cpu(), list(job.pruned.split(sizes)), scales, ratios, job.damping)


def fp8_scale(weight: Tensor) -> Tensor:
    """float32 [N]: largest magnitude of each row over 448, never zero."""
    return weight.abs().amax(dim=-1).clamp_min(_AMAX_FLOOR) / FP8_MAX


def row_curves(
    problems: list[Problem],
    widths: list[int],
    config: PruneConfig,
    generators: list[torch.Generator],
) -> list[Tensor]:
    """Loss of every row at every dense width: float64 [widths, sum N_i] of each problem.

    The loss is tr(e H e^T) of the swept row, after `config.curve_refit_steps` refit steps when
    those are asked for. One order (nested shells of all widths) serves all; the last width must be
    the whole shard, which loses nothing. Problems are of one shape.
    """
    dense = torch.stack([problem.stacked() for problem in problems])
    orders = []
    for problem, weight, generator in zip(problems, dense, generators, strict=True):
        diagonals = None
        if config.score == "obs":
            diagonals, _ = inverse_diagonals(problem, config.damping)
        scores = problem_scores(problem, weight, config, diagonals, generator)
        ranked = rank_columns(scores, widths, problem.k_shards, "snake")
        orders.append(gather_order(ranked, widths))
    size = dense.shape[2] // problems[0].k_shards
    out = torch.zeros(len(problems), len(widths), dense.shape[1], dtype=torch.float64)
    for pieces in _alike(problems):
        hessians = torch.stack([permuted(piece.hessian, orders[piece.index]) for piece in pieces])
        factor = torch.stack([
            damped_factor(hessian, config.damping, problems[piece.index].name)[1]
            for hessian, piece in zip(hessians, pieces, strict=True)
        ])  # fmt: skip
        target = torch.stack([dense[p.index][p.rows][:, orders[p.index]] for p in pieces])
        for i, width in enumerate(widths):
            start = problems[0].k_shards * (size - width)
            if start:
                loss = _curve(target, factor, hessians, start, config).double().cpu()
                for piece, lost in zip(pieces, loss, strict=True):
                    out[piece.index, i, piece.rows] = lost
    return list(out)


@dataclass
class _Piece:
    """Rows of one problem that share a Hessian. index: of the problem in its list."""

    index: int
    rows: slice
    hessian: Tensor


def _alike(problems: list[Problem]) -> list[list[_Piece]]:
    """Pieces of all problems with the same number of rows together."""
    found: dict[int, list[_Piece]] = {}
    for index, problem in enumerate(problems):
        for rows, hessian in problem.parts:
            found.setdefault(rows.stop - rows.start, []).append(_Piece(index, rows, hessian))
    return list(found.values())


def _curve(target, factor, hessians, start: int, config: PruneConfig) -> Tensor:
    """float32 [B, N] at one width."""
    swept = sweep(target, factor, start, coupled=config.mask == "pair")
    if not config.curve_refit_steps:
        return swept.row_loss
    fitted = torch.cat([
        refit(
            swept.weight[i : i + 1], target[i : i + 1], swept.mask[i : i + 1], hessian[None],
            config.curve_refit_steps, start,
        )
        for i, hessian in enumerate(hessians)
    ])  # fmt: skip
    error = fitted - target
    return (torch.matmul(error, hessians) * error).sum(dim=-1)


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
    for job in jobs:
        job.scale = torch.zeros(len(job.dense), device=job.dense.device) if config.fp8 else None
    for pieces in _alike([job.problem for job in jobs]):
        _sweep_pieces(jobs, pieces, orders, starts, first, config)


def _sweep_pieces(jobs, pieces, orders, starts, first: int, config: PruneConfig) -> None:
    """Rows of several jobs, alike in number."""
    hessians = [permuted(piece.hessian, orders[piece.index]) for piece in pieces]
    factors = []
    for piece, hessian in zip(pieces, hessians, strict=True):
        job = jobs[piece.index]
        _, factor, damping = damped_factor(hessian, config.damping, job.problem.name)
        job.damping = max(job.damping, damping)
        factors.append(factor)
    factor = torch.stack(factors)
    start = torch.stack([starts[p.index][p.rows] for p in pieces])
    target = torch.stack([jobs[p.index].dense[p.rows][:, orders[p.index]] for p in pieces])
    swept = sweep(target, factor, start, sparse_start=first, coupled=config.mask == "pair")
    fitted = [
        _fit(swept.weight[i], target[i], swept.mask[i], hessian, start[i], config)
        for i, hessian in enumerate(hessians)
    ]
    weight, mask = (torch.stack(parts) for parts in zip(*fitted, strict=True))
    scale = None
    if config.fp8:
        scale = fp8_scale(weight)
        if config.fp8_feedback:
            weight = sweep(weight, factor, start, mask=mask, scale=scale).weight
        else:
            weight = round_to_fp8(weight, scale[..., None])
    for i, piece in enumerate(pieces):
        job = jobs[piece.index]
        job.pruned[piece.rows] = _restore(weight[i], orders[piece.index])
        if scale is not None:
            job.scale[piece.rows] = scale[i]


def _fit(
    weight: Tensor, target: Tensor, mask: Tensor, hessian: Tensor, start: Tensor, config
) -> tuple[Tensor, Tensor]:
    """Refitted weights [N, K] and their mask: the sweep's, or a searched one that loses less."""

    def fit(weight, mask):
        return refit(
            weight[None], target[None], mask[None], hessian[None], config.refit_steps, start
        )[0]

    fitted = fit(weight, mask)
    if not config.admm_steps:
        return fitted, mask
    other, other_mask = search_mask(weight, target, mask, hessian, config.admm_steps, start)
    other = fit(other, other_mask)
    better = _loss(other - target, hessian) < _loss(fitted - target, hessian)
    return torch.where(better, other, fitted), torch.where(better, other_mask, mask)


def _loss(error: Tensor, hessian: Tensor) -> Tensor:
    """float32 [N, 1]."""
    return ((error @ hessian) * error).sum(dim=-1, keepdim=True)


def _mask_only(job: _Job, config: PruneConfig) -> None:
    """Baselines without compensation: the mask by saliency, kept weights untouched."""
    if job.done:
        return
    saliency = torch.cat([
        weight_saliency(config.method, job.dense[rows], hessian)
        for rows, hessian in job.problem.parts
    ])[:, job.order]  # fmt: skip
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
    size = problem.k // problem.k_shards
    return torch.arange(size, dtype=torch.int32).repeat(problem.k_shards, 1)
