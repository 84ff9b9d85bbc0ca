# SPDX-License-Identifier: Apache-2.0
"""Refit of all kept weights at once, the mask held fixed."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 512  # rows in work at a time on the CPU, so that their five matrices stay in cache


def refit(
    weight: Tensor,
    target: Tensor,
    mask: Tensor,
    hessian: Tensor,
    steps: int,
    damping: float = 1e-4,
) -> Tensor:
    """Minimise tr((V - target) H (V - target)^T) over V with V = 0 off the mask.

    Conjugate gradients with the diagonal of H as preconditioner, every row on its own, started at
    `weight`. A step never raises the objective.

    Args:
        weight: float32 [B, N, K], zero off the mask.
        target: float32 [B, N, K], the dense weights.
        mask: bool [B, N, K].
        hessian: float32 [B, K, K] without damping.
        steps: iterations; each costs 2 B N K^2 flop.
        damping: added to diag(H), relative to its mean over live inputs.

    Returns float32 [B, N, K].
    """
    if steps == 0:
        return weight
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    live = (diagonal > 0).sum(dim=-1, keepdim=True).clamp_min(1)
    ridge = damping * diagonal.sum(dim=-1, keepdim=True) / live
    ridge = torch.where(ridge > 0, ridge, 1.0)
    out = torch.empty_like(weight)
    rows = weight.shape[1] if weight.is_cuda else ROWS
    for a in range(0, weight.shape[1], rows):
        part = slice(a, a + rows)
        out[:, part] = _refit_rows(
            weight[:, part], target[:, part], mask[:, part], hessian, ridge[:, None], steps
        )
    return out


def _refit_rows(weight, target, mask, hessian, ridge, steps: int) -> Tensor:
    keep = mask.float()
    inverse = 1.0 / (hessian.diagonal(dim1=-2, dim2=-1)[:, None] + ridge)
    value = weight.clone()
    delta = value - target
    residual = torch.baddbmm(delta * ridge, delta, hessian).neg_().mul_(keep)
    direction = residual * inverse
    energy = _dot(residual, direction)
    for _ in range(steps):
        image = torch.baddbmm(direction * ridge, direction, hessian).mul_(keep)
        curvature = _dot(direction, image)
        step = torch.where(curvature > 0, energy / curvature, 0.0)
        value.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        preconditioned = residual * inverse
        new = _dot(residual, preconditioned)
        direction.mul_(torch.where(energy > 0, new / energy, 0.0)).add_(preconditioned)
        energy = new
    return value


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1, keepdim=True)
