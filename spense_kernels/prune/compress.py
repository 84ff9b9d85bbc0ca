# SPDX-License-Identifier: Apache-2.0
"""Prune the projections that share one input: order, mask, compensation, refit, FP8.

Pure tensor functions; everything runs on the device of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spense_kernels.prune.admm import search_mask
from spense_kernels.prune.blocks import stacked
from spense_kernels.prune.clock import phase
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.hessian import damped_factors, permuted
from spense_kernels.prune.mask import top2_mask
from spense_kernels.prune.obs import round_to_fp8, sweep
from spense_kernels.prune.order import (
    Problem,
    choose_orders,
    dense_starts,
    distinct_widths,
    gather_order,
)
from spense_kernels.prune.refit import DAMPING, Part, eliminated
from spense_kernels.prune.saliency import weight_saliency
from spense_kernels.quant import weight_scale


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
        refit_damping: the same in refit and mask search; 0 without them.
    """

    k_perm: Tensor
    weights: list[Tensor]
    scales: list[Tensor] | None
    errors: list[float]
    damping: float
    refit_damping: float


def compress(
    problems: list[Problem], config: PruneConfig, generators: list[torch.Generator]
) -> list[Solution]:
    """Prune groups of projections by the settings; see docs/pruning.md for the method.

    Problems of equal shape (the same group in several layers) share the sweeps, which on a GPU
    costs little more than one of them alone.
    """
    jobs, active = _ordered(problems, config, generators)
    if config.method == "obs":
        _sweep_all(active, config)
    else:
        for job in active:
            _mask_only(job, config)
    with phase("losses"):
        return [_finish(job, config) for job in jobs]


def column_orders(
    problems: list[Problem], config: PruneConfig, generators: list[torch.Generator]
) -> list[Tensor]:
    """The k_perm that `compress` gives each problem, int32 [k_shards, K / k_shards]; nothing is
    pruned."""
    return [job.k_perm for job in _ordered(problems, config, generators)[0]]


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
    refit_damping: float = 0.0


def _start(problem: Problem, config: PruneConfig) -> _Job:
    """The columns in their present order."""
    original = torch.cat([w.float() for w in problem.weights])
    starts, k_perm = dense_starts(problem), _identity(problem)
    done = config.dense_fraction == 1.0 or int(starts.max()) == 0
    order = gather_order(k_perm, distinct_widths(problem))
    dense, pruned = problem.stacked(), original.clone()
    return _Job(problem, original, dense, starts, config.damping, k_perm, order, done, pruned)


def _ordered(
    problems: list[Problem], config: PruneConfig, generators
) -> tuple[list[_Job], list[_Job]]:
    """Jobs with their columns in order; all, and those with something to prune."""
    jobs = [_start(problem, config) for problem in problems]
    active = [job for job in jobs if not job.done]
    free = [
        (job, generator)
        for job, generator in zip(jobs, generators, strict=True)
        if not job.done and job.problem.k_perm is None
    ]
    if free:
        with phase("order search"):
            _order([job for job, _ in free], [generator for _, generator in free], config)
    for job in active:
        if job.problem.k_perm is not None:
            job.k_perm = job.problem.k_perm.to(job.dense.device)
            job.order = gather_order(job.k_perm, distinct_widths(job.problem))
    return jobs, active


def _order(jobs: list[_Job], generators: list[torch.Generator], config: PruneConfig) -> None:
    dense, starts = [job.dense for job in jobs], [job.starts for job in jobs]
    k_perms, dampings = choose_orders(
        [job.problem for job in jobs], dense, starts, config, generators
    )
    for job, k_perm, damping in zip(jobs, k_perms, dampings, strict=True):
        job.k_perm, job.damping = k_perm, damping
        job.order = gather_order(k_perm, distinct_widths(job.problem))


def _finish(job: _Job, config: PruneConfig) -> Solution:
    problem, original = job.problem, job.original
    if job.done and config.fp8:  # nothing is sparse: plain FP8 rounding
        job.scale = weight_scale(original)
        job.pruned = round_to_fp8(original, job.scale[:, None])
    sizes = [w.shape[0] for w in problem.weights]
    error, energy = torch.empty(len(original)).double(), torch.empty(len(original)).double()
    for rows, hessian in problem.parts:
        error[rows] = row_losses(job.pruned[rows] - original[rows], hessian).double().cpu()
        energy[rows] = row_losses(original[rows], hessian).double().cpu()
    ratios = [
        float(e.sum() / s.sum().clamp_min(1e-30))
        for e, s in zip(error.split(sizes), energy.split(sizes), strict=True)
    ]
    scales = None if job.scale is None else list(job.scale.split(sizes))
    weights, dampings = list(job.pruned.split(sizes)), (job.damping, job.refit_damping)
    return Solution(job.k_perm.cpu(), weights, scales, ratios, *dampings)


@dataclass
class Piece:
    """Rows of one problem that share a Hessian. index: of the problem in its list."""

    index: int
    rows: slice
    hessian: Tensor


def pieces_alike(problems: list[Problem]) -> list[list[Piece]]:
    """Pieces of all problems with the same number of rows together."""
    found: dict[int, list[Piece]] = {}
    for index, problem in enumerate(problems):
        for rows, hessian in problem.parts:
            found.setdefault(rows.stop - rows.start, []).append(Piece(index, rows, hessian))
    return list(found.values())


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
    for pieces in pieces_alike([job.problem for job in jobs]):
        _sweep_pieces(jobs, pieces, orders, starts, first, config)


def _sweep_pieces(jobs, pieces, orders, starts, first: int, config: PruneConfig) -> None:
    """Rows of several jobs, alike in number."""
    hessian = stacked([permuted(piece.hessian, orders[piece.index]) for piece in pieces])
    names = [jobs[piece.index].problem.name for piece in pieces]
    with phase("factors"):
        factor, dampings = damped_factors(hessian, config.damping, names)
    for piece, damping in zip(pieces, dampings, strict=True):
        jobs[piece.index].damping = max(jobs[piece.index].damping, damping)
    start = torch.stack([starts[p.index][p.rows] for p in pieces])
    target = torch.stack([jobs[p.index].dense[p.rows][:, orders[p.index]] for p in pieces])
    with phase("sweep"):
        swept = sweep(target, factor, start, sparse_start=first, coupled=config.mask == "pair")
    weight, mask, refit_dampings = _fit(
        swept.weight, target, swept.mask, hessian, start, names, config
    )
    for piece, damping in zip(pieces, refit_dampings, strict=True):
        job = jobs[piece.index]
        job.refit_damping = max(job.refit_damping, damping)
    scale = None
    if config.fp8:
        scale = weight_scale(weight)
        with phase("fp8"):
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
    weight: Tensor, target: Tensor, mask: Tensor, hessian: Tensor, start: Tensor, names, config
) -> tuple[Tensor, Tensor, list[float]]:
    """Refitted weights [B, N, K], their mask (the sweep's, or a searched one that loses less), and
    the damping of each matrix."""
    if not (config.admm_steps or config.refit_steps):
        return weight, mask, [0.0] * len(names)
    used = [DAMPING] * len(names)
    out, kept = weight.clone(), mask.clone()
    for part in eliminated(hessian, start, names=names):
        block = part.block
        found, of_rows = _fit_part(part, *map(block.take, (weight, target, mask)), hessian, config)
        block.put(out, found)
        block.put(kept, of_rows)
        if part.damping is not None:
            for i, damping in zip(block.which.flatten().tolist(), part.damping, strict=True):
                used[i] = max(used[i], float(damping))
    return out, kept, used


def _fit_part(part: Part, weight: Tensor, target: Tensor, mask: Tensor, hessian: Tensor, config):
    """`_fit` of the rows [b, R, K] of one part."""
    steps = config.refit_steps
    if not config.admm_steps:
        with phase("refit"):
            return part.refitted(weight, target, mask, steps), mask
    with phase("mask search"):
        other, other_mask = search_mask(part, weight, target, mask, config.admm_steps)
    with phase("refit"):  # both at once: twice the rows in as many kernels
        masks = torch.cat([mask, other_mask], dim=1)
        targets = torch.cat([target, target], dim=1)
        fitted = part.refitted(torch.cat([weight, other], dim=1), targets, masks, steps)
        loss = row_losses(fitted - targets, part.block.of(hessian))
    (fitted, other), (loss, other_loss) = fitted.chunk(2, dim=1), loss.chunk(2, dim=1)
    better = (other_loss < loss)[..., None]
    return torch.where(better, other, fitted), torch.where(better, other_mask, mask)


def row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """float32 [..., N] = diag(E H E^T) for errors [..., N, K]."""
    return ((error @ hessian) * error).sum(dim=-1)


def _mask_only(job: _Job, config: PruneConfig) -> None:
    """Baselines without compensation: the mask by saliency, kept weights untouched."""
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
        job.scale = weight_scale(weight)
        weight = round_to_fp8(weight, job.scale[:, None])
    job.pruned = weight


def _restore(weight: Tensor, order: Tensor) -> Tensor:
    out = torch.empty_like(weight)
    out[:, order] = weight
    return out


def _identity(problem: Problem) -> Tensor:
    size = problem.k // problem.k_shards
    return torch.arange(size, dtype=torch.int32).repeat(problem.k_shards, 1)
