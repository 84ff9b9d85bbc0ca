# SPDX-License-Identifier: Apache-2.0
"""A better 2:4 mask than one sweep finds: alternating directions on mask and weights.

V minimises the layer loss pulled towards D, D is V (plus the multipliers) cut to 2:4, and the pull
grows until they agree. A sweep decides column by column and never looks back; this looks at all
columns at once, at the price of one product with a K x K matrix a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spense_kernels.prune.mask import top2_mask
from spense_kernels.prune.refit import ridged, schur_complement

FIRST_PULL, LAST_PULL = 0.3, 2.0  # over the diagonal of H scaled to 1
PULL_STEPS = 5  # steps between two pulls; each new one costs an inverse
ROWS = 512  # rows in work at a time on the CPU


def search_mask(
    weight: Tensor,
    target: Tensor,
    mask: Tensor,
    hessian: Tensor,
    steps: int,
    dense_start: Tensor,
    damping: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """A 2:4 mask for rows whose first `dense_start` columns are sparse, and weights on it.

    Args:
        weight: float32 [N, K], zero off the mask: where the search starts.
        target: float32 [N, K], the dense weights.
        mask: bool [N, K]; true from dense_start on.
        hessian: float32 [K, K] without damping.
        steps: of the search.
        dense_start: int64 [N].
        damping: added to diag(H), relative to its mean over live inputs.

    Returns weights float32 [N, K] (not refitted) and mask bool [N, K].
    """
    full = ridged(hessian, damping)
    weight, mask = weight.clone(), mask.clone()
    for start in dense_start.unique().tolist():
        # A short last group keeps the sweep's choice.
        if start < 4 or start % 4:
            continue
        rows = (dense_start == start).nonzero().flatten()
        reduced, _ = schur_complement(full[None], start)
        found = _search(weight[rows, :start], target[rows, :start], reduced[0], steps)
        weight[rows, :start] = found
        mask[rows, :start] = _two_of_four(found)
    return weight, mask


def _two_of_four(values: Tensor) -> Tensor:
    """Exactly two kept a group, even where zeros survived."""
    return top2_mask(values.abs())


def _search(start: Tensor, target: Tensor, hessian: Tensor, steps: int) -> Tensor:
    root = hessian.diagonal().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    scaled = hessian / root / root[:, None]
    cut = start * root
    goal = (target * root) @ scaled
    multiplier = torch.zeros_like(cut)
    pulls = max(1, -(-steps // PULL_STEPS))
    growth = (LAST_PULL / FIRST_PULL) ** (1.0 / max(1, pulls - 1))
    eye = torch.eye(len(root), device=root.device)
    size = len(cut) if cut.is_cuda else ROWS
    for i in range(pulls):
        pull = FIRST_PULL * growth**i
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled + pull * eye))
        count = min(PULL_STEPS, steps - i * PULL_STEPS)
        for part in zip(cut.split(size), goal.split(size), multiplier.split(size), strict=True):
            _steps(*part, inverse, pull, count)
    return cut / root


def _steps(cut: Tensor, goal: Tensor, multiplier: Tensor, inverse: Tensor, pull: float, count: int):
    """Some steps at one pull; `cut` and `multiplier` [n, K] change in place."""
    for _ in range(count):
        value = torch.add(goal, cut, alpha=pull).sub_(multiplier) @ inverse
        torch.add(value, multiplier, alpha=1.0 / pull, out=cut)
        cut *= top2_mask(cut.abs())
        multiplier.add_(value.sub_(cut), alpha=pull)
