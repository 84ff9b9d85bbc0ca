# SPDX-License-Identifier: Apache-2.0
"""Which two weights of every four stay."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# The six pairs that may be dropped from a group of four.
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def top2_mask(scores: Tensor) -> Tensor:
    """Keep the two largest scores of every four consecutive columns; ties keep the earlier one.

    Args:
        scores: [..., K]. When K % 4 != 0 the last, short group keeps its two largest.

    Returns bool [..., K].
    """
    k = scores.shape[-1]
    pad = -k % 4
    if pad:
        scores = torch.nn.functional.pad(scores.float(), (0, pad), value=-torch.inf)
    # Comparisons are ten times as fast here as a sort of so many groups of four.
    a, b, c, d = scores.unflatten(-1, (-1, 4)).unbind(-1)
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    kept = (
        _two_of(ab, ac, ad), _two_of(~ab, bc, bd), _two_of(~ac, ~bc, cd), ~_two_of(ad, bd, cd),
    )  # fmt: skip
    return torch.stack(kept, dim=-1).flatten(-2)[..., :k]


def _two_of(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Where at least two of three are true."""
    return (x & y) | (z & (x | y))


def is_2to4(weight: Tensor) -> bool:
    """Whether every four consecutive columns of [..., K] hold at most two nonzeros."""
    nonzero = weight != 0
    pad = -nonzero.shape[-1] % 4
    grouped = torch.nn.functional.pad(nonzero, (0, pad)).unflatten(-1, (-1, 4))
    return bool((grouped.sum(dim=-1) <= 2).all())


def drop_forms(group_factor: Tensor, coupled: bool = True) -> Tensor:
    """What the weights of a group are multiplied with to choose a pair and to drop it.

    With C the group's block of the inverse Hessian of the columns not yet visited, dropping pair
    P costs w_P^T (C_PP)^-1 w_P: a sum of two squares of what is linear in the weights. So are the
    errors (w - q) / U_jj of the sweep at the four columns.

    Args:
        group_factor: [..., 4, 4] diagonal block of the factor U; C = U^T U there.
        coupled: False leaves out the coupling of the two (w_p^2 / U_pp^2 each, SparseGPT).

    Returns float32 [..., 40, 4]: a root of the cost for each of `PAIRS`, another for each, then
    four errors for each of them and for no pair.
    """
    factor = group_factor.double()
    device = factor.device
    p, q = _pairs(device)
    first, second = factor[..., p, p], factor[..., q, q]
    link = factor[..., p, q] / first  # of q's weight, what dropping p subtracts is link * w_p
    errors = torch.zeros(*factor.shape[:-2], 7, 4, 4, dtype=torch.float64, device=device)
    pair = torch.arange(6, device=device)
    errors[..., pair, p, p] = 1.0 / first
    errors[..., pair, q, q] = 1.0 / second
    errors[..., pair, q, p] = -link / second
    if coupled:
        block = factor.transpose(-1, -2) @ factor
        a, b, c = block[..., p, p], block[..., p, q], block[..., q, q]
        first, link = a.sqrt(), b / a
        second = (c - link * b).sqrt()
    roots = torch.zeros(*factor.shape[:-2], 2, 6, 4, dtype=torch.float64, device=device)
    roots[..., 0, pair, p] = 1.0 / first
    roots[..., 1, pair, q] = 1.0 / second
    if coupled:
        roots[..., 1, pair, p] = -link / second
    return torch.cat([roots.flatten(-3, -2), errors.flatten(-3, -2)], dim=-2).float()


def cheapest_pair(formed: Tensor) -> Tensor:
    """int64 [B, N] in `PAIRS`, of `drop_forms` [B, 40, 4] times the weights [B, 4, N]."""
    first, second = formed[:, :6], formed[:, 6:12]
    # A norm and argmin take many times as long on a CPU.
    return torch.addcmul(first * first, second, second).min(dim=1).indices


@functools.cache
def kept_places(device: torch.device) -> Tensor:
    """bool [7, 4]: whether a place survives each dropped pair, and that of no pair."""
    rows = [[i not in pair for i in range(4)] for pair in (*PAIRS, ())]
    return torch.tensor(rows, device=device)


@functools.cache
def _pairs(device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [6] each: first and second places of `PAIRS`."""
    p, q = torch.tensor(PAIRS, device=device).T.contiguous()
    return p, q


def choose_single(group: Tensor, group_factor: Tensor) -> Tensor:
    """Mask of a short group of three: only its cheapest weight goes.

    Args:
        group: float32 [..., 3, N].
        group_factor: [..., 3, 3] diagonal block of U.
    """
    diagonal = group_factor.square().sum(dim=-2)
    cheapest = (group.square() / diagonal[..., None]).argmin(dim=-2, keepdim=True)
    index = torch.arange(3, device=group.device)[:, None]
    return index != cheapest
