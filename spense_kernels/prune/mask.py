# SPDX-License-Identifier: Apache-2.0
"""Which two weights of every four stay."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# The six pairs that may be dropped from a group of four, and the terms of their costs.
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


def drop_costs(group_factor: Tensor, coupled: bool = True) -> Tensor:
    """Coefficients of the loss of dropping each pair of a group, over products of its weights.

    With C the group's block of the inverse Hessian of the columns not yet visited, dropping pair
    P costs w_P^T (C_PP)^-1 w_P, a quadratic form in two weights.

    Args:
        group_factor: [..., 4, 4] diagonal block of the factor U; C = U^T U there.
        coupled: False leaves out the coupling of the two (w_p^2 / U_pp^2 each, SparseGPT).

    Returns float32 [..., 6, 10]: rows are `PAIRS`, columns the four squares, then the products of
    `PAIRS`.
    """
    factor = group_factor.double()
    out = torch.zeros(*factor.shape[:-2], 6, 10, dtype=torch.float64, device=factor.device)
    block = factor.transpose(-1, -2) @ factor
    for i, (p, q) in enumerate(PAIRS):
        if coupled:
            a, b, c = block[..., p, p], block[..., p, q], block[..., q, q]
            determinant = a * c - b * b
            out[..., i, p] = c / determinant
            out[..., i, q] = a / determinant
            out[..., i, 4 + i] = -2.0 * b / determinant
        else:
            out[..., i, p] = 1.0 / factor[..., p, p].square()
            out[..., i, q] = 1.0 / factor[..., q, q].square()
    return out.float()


def products(group: Tensor) -> Tensor:
    """[..., 10, N] squares and pair products of the weights [..., 4, N] of a group."""
    pairs = [group[..., p, :] * group[..., q, :] for p, q in PAIRS]
    return torch.cat([group.square(), torch.stack(pairs, dim=-2)], dim=-2)


def choose_pair(group: Tensor, costs: Tensor) -> Tensor:
    """Best mask of one group.

    Args:
        group: float32 [..., 4, N], current (compensated) weights.
        costs: [..., 6, 10] from `drop_costs`.

    Returns bool [..., 4, N], True = kept.
    """
    cheapest = torch.matmul(costs, products(group)).argmin(dim=-2, keepdim=True)
    keep = _kept(group.device)
    return torch.stack([keep[i][cheapest.squeeze(-2)] for i in range(4)], dim=-2)


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


@functools.cache
def _kept(device: torch.device) -> Tensor:
    """bool [4, 6]: whether a place survives each dropped pair."""
    return torch.tensor([[i not in pair for pair in PAIRS] for i in range(4)], device=device)
