# SPDX-License-Identifier: Apache-2.0
"""Refit of all kept weights at once, the mask held fixed.

Dense columns are free in every row, so they are eliminated exactly: for any sparse part V_s the
best dense part is W_d - (V_s - W_s) H_sd H_dd^-1, and what is left to minimise has the Schur
complement H_ss - H_sd H_dd^-1 H_ds in place of H. It is smaller, and far better conditioned when
the dense columns are the strongest ones: 5 steps then do what 100 do on the whole of H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spense_kernels.prune.blocks import blocks
from spense_kernels.prune.hessian import cholesky

ROWS = 512  # rows in work at a time on the CPU, so that their five matrices stay in cache


def refit(
    weight: Tensor,
    target: Tensor,
    mask: Tensor,
    hessian: Tensor,
    steps: int,
    dense_start: Tensor | int | None = None,
    damping: float = 1e-4,
) -> Tensor:
    """Minimise tr((V - target) H (V - target)^T) over V with V = 0 off the mask.

    Conjugate gradients with the diagonal as preconditioner, every row on its own, started at
    `weight`. No step raises the objective.

    Args:
        weight: float32 [B, N, K], zero off the mask.
        target: float32 [B, N, K], the dense weights.
        mask: bool [B, N, K]; true from dense_start on.
        hessian: float32 [B, K, K] without damping.
        steps: iterations; each costs 2 B N S^2 flop for S sparse columns. 0 changes nothing.
        dense_start: first column of the dense part: int or integer tensor [N] or [B, N]; None
            for K.
        damping: added to diag(H), relative to its mean over live inputs.

    Returns float32 [B, N, K].
    """
    if steps == 0:
        return weight
    full = ridged(hessian, damping)
    k, n = hessian.shape[-1], weight.shape[1]
    starts = torch.as_tensor(k if dense_start is None else dense_start, device=weight.device)
    starts = starts.expand(weight.shape[0], n)
    out = weight.clone()
    for block in blocks(starts):
        problem = block.take(weight), block.take(target), block.take(mask)
        block.put(out, _refit_block(*problem, block.of(full), steps, block.start))
    return out


def _refit_block(weight, target, mask, hessian, steps: int, start: int) -> Tensor:
    """Rows whose first `start` columns are sparse."""
    if start == 0:
        return target
    sparse, dense = slice(0, start), slice(start, None)
    reduced, back = schur_complement(hessian, start)
    out = torch.empty_like(weight)
    size = weight.shape[1] if weight.is_cuda else ROWS
    for a in range(0, weight.shape[1], size):
        rows = slice(a, a + size)
        part = weight[:, rows, sparse], target[:, rows, sparse], mask[:, rows, sparse]
        out[:, rows, sparse] = _conjugate_gradients(*part, reduced, steps)
    if back is not None:
        delta = out[:, :, sparse] - target[:, :, sparse]
        out[:, :, dense] = target[:, :, dense] - delta @ back.transpose(1, 2)
    return out


def schur_complement(hessian: Tensor, start: int) -> tuple[Tensor, Tensor | None]:
    """H_ss - H_sd H_dd^-1 H_ds [B, start, start], and H_dd^-1 H_ds (None without dense columns)."""
    if start == hessian.shape[-1]:
        return hessian, None
    sparse, dense = slice(0, start), slice(start, None)
    lower = cholesky(hessian[:, dense, dense])
    back = torch.cholesky_solve(hessian[:, dense, sparse], lower)
    reduced = hessian[:, sparse, sparse] - hessian[:, sparse, dense] @ back
    return 0.5 * (reduced + reduced.transpose(1, 2)), back


def _conjugate_gradients(weight, target, mask, hessian, steps: int) -> Tensor:
    keep = mask.float()
    inverse = 1.0 / hessian.diagonal(dim1=-2, dim2=-1)[:, None]
    value = weight.clone()
    residual = torch.matmul(target - value, hessian).mul_(keep)
    direction = residual * inverse
    energy = _dot(residual, direction)
    for _ in range(steps):
        image = torch.matmul(direction, hessian).mul_(keep)
        curvature = _dot(direction, image)
        step = torch.where(curvature > 0, energy / curvature, 0.0)
        value.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        preconditioned = residual * inverse
        new = _dot(residual, preconditioned)
        direction.mul_(torch.where(energy > 0, new / energy, 0.0)).add_(preconditioned)
        energy = new
    return value


def ridged(hessian: Tensor, damping: float) -> Tensor:
    """H [..., K, K] with damping * mean(diag H) over live inputs on the diagonal (a copy)."""
    out = hessian.clone()
    diagonal = out.diagonal(dim1=-2, dim2=-1)
    live = (diagonal > 0).sum(dim=-1, keepdim=True).clamp_min(1)
    ridge = damping * diagonal.sum(dim=-1, keepdim=True) / live
    diagonal += torch.where(ridge > 0, ridge, 1.0)
    return out


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1, keepdim=True)
