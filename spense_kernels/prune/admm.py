# SPDX-License-Identifier: Apache-2.0
"""A better 2:4 mask than one sweep finds: alternating directions on mask and weights.

V minimises the layer loss pulled towards D, D is V (plus the multipliers) cut to 2:4, and the pull
grows until they agree. A sweep decides column by column and never looks back; this looks at all
columns at once, at the price of one product with a K x K matrix a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spense_kernels.prune.hessian import cholesky, unit_diagonal
from spense_kernels.prune.mask import top2_mask
from spense_kernels.prune.refit import Part

FIRST_PULL, LAST_PULL = 0.3, 2.0  # over the diagonal of H scaled to 1; above refit.MARGIN
NEWTON_GROWTH = 1.5  # of the pull: at most 0.5^16 of an inverse is lost in four steps of Newton's
NEWTON_COLUMNS = 2048  # of the largest matrix that, alone, is not factorised faster on a GPU
PULL_STEPS = 5  # steps between two pulls; each new one costs an inverse
ROWS = 512  # rows in work at a time on the CPU


def search_mask(
    part: Part, weight: Tensor, target: Tensor, mask: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """A 2:4 mask for the rows of a part, and weights on it.

    Args:
        part: whose block's `take` gives the rows of the other three.
        weight: float32 [b, R, K], zero off the mask: where the search starts.
        target: float32 [b, R, K], the dense weights.
        mask: bool [b, R, K]; true in the dense columns.
        steps: of the search.

    Returns weights float32 [b, R, K] (not refitted) and mask bool [b, R, K].
    """
    start = part.block.start
    if start < 4 or start % 4:  # a short last group keeps the sweep's choice
        return weight, mask
    weight, mask = weight.clone(), mask.clone()
    found = _search(weight[..., :start], target[..., :start], part.reduced, steps)
    weight[..., :start] = found
    mask[..., :start] = top2_mask(found.abs())  # exactly two kept a group, even of zeros
    return weight, mask


def _search(start: Tensor, target: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """[B, N, S] at one dense start S."""
    scaled, root = unit_diagonal(hessian)
    cut = start * root
    goal = (target * root) @ scaled
    dual = torch.zeros_like(cut)  # multipliers over the pull
    pulls = max(1, -(-steps // PULL_STEPS))
    growth = (LAST_PULL / FIRST_PULL) ** (1.0 / max(1, pulls - 1))
    inverse = None
    for i in range(pulls):
        pull = FIRST_PULL * growth**i
        inverse = _inverse(scaled, pull, inverse if growth <= NEWTON_GROWTH else None)
        count = min(PULL_STEPS, steps - i * PULL_STEPS)
        for one, part in _parts(cut):
            _steps(cut[one, part], goal[one, part], dual[one, part], inverse[one], pull, count)
        dual /= growth
    return cut / root


def _parts(values: Tensor):
    """What is worked on together: everything on a GPU, what caches hold on a CPU."""
    if values.is_cuda:
        return [(slice(None), slice(None))]
    return [
        (slice(i, i + 1), slice(a, a + ROWS))
        for i in range(values.shape[0])
        for a in range(0, values.shape[1], ROWS)
    ]


def _inverse(scaled: Tensor, pull: float, before: Tensor | None) -> Tensor:
    """(scaled + pull I)^-1; `before` is that of a pull at most NEWTON_GROWTH times smaller.

    On a GPU the inverses before are improved by Newton's steps, which are matrix products only:
    factorisations take far longer there, and wait for the device.
    """
    shifted = scaled.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(pull)
    single = len(scaled) == 1 and scaled.shape[-1] > NEWTON_COLUMNS
    if before is None or not scaled.is_cuda or single:
        return torch.cholesky_inverse(cholesky(shifted))
    return newton_inverse(shifted, before)


def newton_inverse(matrix: Tensor, guess: Tensor, steps: int = 4) -> Tensor:
    """Inverse of [B, K, K] by X <- X (2 I - A X) from a guess with |I - A X| < 1."""
    for _ in range(steps):
        guess = torch.baddbmm(guess, guess, matrix @ guess, beta=2.0, alpha=-1.0)
    return guess


def _steps(cut: Tensor, goal: Tensor, dual: Tensor, inverse: Tensor, pull: float, count: int):
    """Some steps at one pull; `cut` and `dual` [B, n, K] change in place.

    Buffers and views of them are made once: for few rows a GPU waits for the host otherwise.
    """
    solved = goal @ inverse
    value, other = torch.empty_like(cut), torch.empty_like(cut)
    largest = _TwoLargest(other)
    for _ in range(count):
        torch.add(dual, solved, out=value)
        torch.sub(cut, dual, out=other)
        value.baddbmm_(other, inverse, alpha=pull)
        torch.abs(value, out=other)
        torch.mul(value, largest.mask(), out=cut)
        torch.sub(value, cut, out=dual)


class _TwoLargest:
    """bool [..., K] as of `top2_mask` for what `values` holds at the time, in fewer kernels; ties
    keep more than two."""

    def __init__(self, values: Tensor):
        self._fours = values.unflatten(-1, (-1, 4))
        self._columns = self._fours.unbind(-1)
        self._buffers = [torch.empty_like(self._columns[0]) for _ in range(3)]
        self._least = self._buffers[0][..., None]
        self._kept = torch.empty_like(values, dtype=torch.bool)
        self._kept_fours = self._kept.unflatten(-1, (-1, 4))

    def mask(self) -> Tensor:
        """The mask, in a tensor that the next call writes to."""
        (a, b, c, d), (x, y, z) = self._columns, self._buffers
        torch.minimum(a, b, out=x)
        torch.minimum(c, d, out=y)
        torch.maximum(x, y, out=x)
        torch.maximum(a, b, out=y)
        torch.maximum(c, d, out=z)
        torch.minimum(y, z, out=y)
        torch.maximum(x, y, out=x)
        torch.ge(self._fours, self._least, out=self._kept_fours)
        return self._kept
