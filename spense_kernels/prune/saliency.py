# SPDX-License-Identifier: Apache-2.0
"""How much each column of a weight matters, and how much each weight."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_diagonal(factor: Tensor) -> Tensor:
    """diag(H^-1) float32 [..., K] from the factor U of H^-1 = U^T U."""
    return factor.square().sum(dim=-2)


def column_scores(
    kind: str,
    weight: Tensor,
    hessian: Tensor,
    inverse_diag: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """float32 [K], larger = more worth keeping dense.

    Args:
        kind: "wanda" = H_jj sum_i W_ij^2, "activation" = H_jj, "magnitude" = sum_i W_ij^2,
            "obs" = sum_i W_ij^2 / [H^-1]_jj, "random".
        weight: [N, K]; projections that share an input are stacked by rows.
        hessian: float32 [K, K].
        inverse_diag: float32 [K], for "obs".
        generator: on the CPU, for "random".
    """
    diagonal = hessian.diagonal()
    if kind == "activation":
        return diagonal.clone()
    if kind == "random":
        return torch.rand(weight.shape[1], generator=generator).to(weight.device)
    energy = weight.float().square().sum(dim=0)
    if kind == "magnitude":
        return energy
    if kind == "wanda":
        return energy * diagonal
    return energy / inverse_diag


def weight_saliency(kind: str, weight: Tensor, hessian: Tensor, inverse_diag=None) -> Tensor:
    """float32 [N, K]: what removing single weights costs.

    "obs" = W^2 / [H^-1]_jj (others compensate), "wanda" = W^2 H_jj (nobody does),
    "magnitude" = W^2.
    """
    square = weight.float().square()
    if kind == "magnitude":
        return square
    if kind == "wanda":
        return square * hessian.diagonal()
    return square / inverse_diag
