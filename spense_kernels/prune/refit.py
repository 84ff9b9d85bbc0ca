# SPDX-License-Identifier: Apache-2.0
"""Refit of all kept weights at once, the mask held fixed.

Dense columns are free in every row, so they are eliminated exactly: for any sparse part V_s the
best dense part is W_d - (V_s - W_s) H_sd H_dd^-1, and what is left to minimise has the Schur
complement H_ss - H_sd H_dd^-1 H_ds in place of H. It is smaller, and far better conditioned when
the dense columns are the strongest ones: 5 steps then do what 100 do on the whole of H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spense_kernels.prune.blocks import Block, blocks
from spense_kernels.prune.hessian import cholesky

DAMPING = 1e-4  # of H in refit and mask search
ROWS = 512  # rows in work at a time on the CPU, so that their five matrices stay in cache


@dataclass
class Part:
    """Rows with the same first dense column, and what is left of H for their sparse columns.

    Attributes:
        block: the rows.
        reduced: float32 [b, S, S] Schur complement of H, of the matrices that have such rows.
        back: H_dd^-1 H_ds float32 [b, K - S, S]; None without dense columns.
    """

    block: Block
    reduced: Tensor
    back: Tensor | None

    def refitted(self, weight: Tensor, target: Tensor, mask: Tensor, steps: int) -> Tensor:
        """[b, R, K] refitted, of the rows that `block.take` gives; 0 steps change nothing."""
        start = self.block.start
        if steps == 0:
            return weight
        if start == 0:
            return target
        sparse, dense = slice(0, start), slice(start, None)
        out = torch.empty_like(weight)
        size = weight.shape[1] if weight.is_cuda else ROWS
        for a in range(0, weight.shape[1], size):
            rows = slice(a, a + size)
            given = weight[:, rows, sparse], target[:, rows, sparse], mask[:, rows, sparse]
            out[:, rows, sparse] = _conjugate_gradients(*given, self.reduced, steps)
        if self.back is not None:
            delta = out[:, :, sparse] - target[:, :, sparse]
            out[:, :, dense] = target[:, :, dense] - delta @ self.back.transpose(1, 2)
        return out


def eliminated(hessian: Tensor, dense_start: Tensor, damping: float = DAMPING) -> Iterator[Part]:
    """One part after another: large H leave no room for several.

    Args:
        hessian: float32 [B, K, K] without damping.
        dense_start: int64 [B, N] first dense column of every row.
        damping: added to diag(H), relative to its mean over live inputs.
    """
    full = ridged(hessian, damping)
    for block in blocks(dense_start):
        if block.start == 0:
            yield Part(block, full[:, :0, :0], None)
        else:
            yield Part(block, *schur_complement(block.of(full), block.start))


def refit(
    weight: Tensor,
    target: Tensor,
    mask: Tensor,
    hessian: Tensor,
    steps: int,
    dense_start: Tensor | int | None = None,
    damping: float = DAMPING,
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
    k, n = hessian.shape[-1], weight.shape[1]
    starts = torch.as_tensor(k if dense_start is None else dense_start, device=weight.device)
    out = weight.clone()
    for part in eliminated(hessian, starts.expand(weight.shape[0], n), damping):
        rows = [part.block.take(values) for values in (weight, target, mask)]
        part.block.put(out, part.refitted(*rows, steps))
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
    # Residuals below rounding say nothing more, and steps along them would grow without bound.
    floor = energy * torch.finfo(torch.float32).eps ** 2
    for _ in range(steps):
        image = torch.matmul(direction, hessian).mul_(keep)
        curvature = _dot(direction, image)
        live = energy > floor
        step = torch.where(live & (curvature > 0), energy / curvature, 0.0)
        value.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        preconditioned = residual * inverse
        new = _dot(residual, preconditioned)
        direction = torch.addcmul(preconditioned, torch.where(live, new / energy, 0.0), direction)
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
