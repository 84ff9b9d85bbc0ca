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

from spense_kernels.errors import PruneError
from spense_kernels.prune.blocks import Block, blocks
from spense_kernels.prune.hessian import checked_cholesky, unit_diagonal

DAMPING = 1e-4  # of H in refit and mask search
ATTEMPTS = 6  # each with tenfold the damping of the one before
MARGIN = 0.1  # over the unit diagonal: what rounding may have taken from an eigenvalue
ROWS = 512  # rows in work at a time on the CPU, so that their five matrices stay in cache


@dataclass
class Part:
    """Rows with the same first dense column, and what is left of H for their sparse columns.

    Attributes:
        block: the rows.
        reduced: float32 [b, S, S] Schur complement of H, of the matrices that have such rows.
        back: H_dd^-1 H_ds float32 [b, K - S, S]; None without dense columns.
        damping: of each of the b matrices, where some needed more than was asked for; else None.
    """

    block: Block
    reduced: Tensor
    back: Tensor | None
    damping: Tensor | None = None

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


def eliminated(
    hessian: Tensor,
    dense_start: Tensor,
    damping: float = DAMPING,
    names: list[str] | None = None,
) -> Iterator[Part]:
    """One part after another: large H leave no room for several.

    Where a few directions hold nearly all of H, rounding of its sums is more than the damping, and
    what is left of H without them comes out indefinite: such a matrix gets tenfold the damping, as
    often as it takes.

    Args:
        hessian: float32 [B, K, K] without damping.
        dense_start: int64 [B, N] first dense column of every row.
        damping: added to diag(H), relative to its mean over live inputs.
        names: of the matrices, for errors.

    Raises PruneError for a matrix that ATTEMPTS of them leave indefinite.
    """
    full = ridged(hessian, damping)
    for block in blocks(dense_start):
        if block.start == 0:
            yield Part(block, full[:, :0, :0], None)
        else:
            yield _sound_part(block, full, hessian, damping, names)


def _sound_part(block: Block, full: Tensor, hessian: Tensor, damping: float, names) -> Part:
    """A part of `full`, or of H [B, K, K] damped anew in the matrices where that fails."""
    reduced, back, sound = schur_complement(block.of(full), block.start)
    if bool(sound.all()):
        return Part(block, reduced, back)
    used = torch.full((len(sound), 1), damping, device=hessian.device)
    for _ in range(ATTEMPTS - 1):
        used = torch.where(sound[:, None], used, 10.0 * used)
        reduced, back, sound = schur_complement(ridged(block.of(hessian), used), block.start)
        if bool(sound.all()):
            return Part(block, reduced, back, used.flatten())
    worst = int(block.which.flatten()[~sound][0])
    raise PruneError(
        f"prune: {names[worst] if names else f'matrix {worst}'}: H without its last "
        f"{hessian.shape[-1] - block.start} columns stays indefinite with damping "
        f"{float(used.max()):g}"
    )


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


def schur_complement(hessian: Tensor, start: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """H_ss - H_sd H_dd^-1 H_ds [B, start, start], H_dd^-1 H_ds (None without dense columns), and
    bool [B]: which of them are positive definite up to MARGIN. The others mean nothing."""
    if start == hessian.shape[-1]:
        return hessian, None, _nearly_definite(hessian)
    sparse, dense = slice(0, start), slice(start, None)
    lower, sound = checked_cholesky(hessian[:, dense, dense])
    back = torch.cholesky_solve(hessian[:, dense, sparse], lower)
    reduced = hessian[:, sparse, sparse] - hessian[:, sparse, dense] @ back
    reduced = 0.5 * (reduced + reduced.transpose(1, 2))
    return reduced, back, sound & _nearly_definite(reduced)


def _nearly_definite(matrix: Tensor) -> Tensor:
    """bool [B]: whose eigenvalues, the diagonal scaled to 1, are above -MARGIN."""
    scaled, _ = unit_diagonal(matrix)
    scaled.diagonal(dim1=-2, dim2=-1).add_(MARGIN)
    positive = (matrix.diagonal(dim1=-2, dim2=-1) > 0).all(dim=-1)
    return checked_cholesky(scaled)[1] & positive


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


def ridged(hessian: Tensor, damping: float | Tensor) -> Tensor:
    """H [..., K, K] with damping * mean(diag H) over live inputs on the diagonal (a copy).

    The damping is one number or [..., 1], one a matrix.
    """
    out = hessian.clone()
    diagonal = out.diagonal(dim1=-2, dim2=-1)
    live = (diagonal > 0).sum(dim=-1, keepdim=True).clamp_min(1)
    ridge = damping * diagonal.sum(dim=-1, keepdim=True) / live
    diagonal += torch.where(ridge > 0, ridge, 1.0)
    return out


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1, keepdim=True)
