# SPDX-License-Identifier: Apache-2.0
"""2:4 masks: the property, and the exact choice of a pair against brute force."""

from itertools import combinations

import pytest
import torch

from spense_kernels.prune.hessian import damp, inverse_factor
from spense_kernels.prune.mask import (
    PAIRS,
    cheapest_pair,
    choose_single,
    drop_forms,
    is_2to4,
    kept_places,
    top2_mask,
)


def random_factor(k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return inverse_factor(damp(x.T @ x, 0.01))


def removal_loss(hessian: torch.Tensor, weight: torch.Tensor, dropped: tuple) -> float:
    """Least loss of a row when `dropped` must be zero and all others may move (float64)."""
    kept = [j for j in range(hessian.shape[0]) if j not in dropped]
    h = hessian.double()
    target = h[kept] @ weight.double()
    best = torch.zeros_like(weight, dtype=torch.float64)
    best[kept] = torch.linalg.solve(h[kept][:, kept], target)
    change = best - weight.double()
    return float(change @ h @ change)


def choose_pair(weight: torch.Tensor, factor: torch.Tensor, coupled: bool = True) -> torch.Tensor:
    """bool [4, N]: what stays of a group [4, N] under the factor [4, 4]."""
    pair = cheapest_pair((drop_forms(factor, coupled) @ weight)[None])[0]
    return kept_places(weight.device)[pair].T


@pytest.mark.parametrize("k", [4, 64, 70, 3, 1])
def test_top2_mask_keeps_two_of_four(k):
    scores = torch.rand(33, k, generator=torch.Generator().manual_seed(k))
    mask = top2_mask(scores)
    assert is_2to4(mask.float())
    assert mask.sum(dim=1).eq(2 * (k // 4) + min(2, k % 4)).all()
    for row in range(33):
        for g in range(0, k, 4):
            size = min(4, k - g)
            kept = mask[row, g : g + size]
            if size > 2:
                assert (
                    scores[row, g : g + size][kept].min() >= scores[row, g : g + size][~kept].max()
                )


def test_top2_mask_ties_keep_the_earlier():
    assert top2_mask(torch.zeros(1, 8)).tolist() == [[True, True, False, False] * 2]


def test_pair_choice_is_the_best_of_six():
    """Against the definition: drop the pair, let every other weight of the row move, solve."""
    k, rows = 12, 40
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, k, generator=generator) @ torch.randn(k, k, generator=generator)
    hessian = damp(x.T @ x, 0.01)
    factor = inverse_factor(hessian)
    weight = torch.randn(rows, k, generator=generator)
    keep = choose_pair(weight.T[:4], factor[:4, :4]).T
    for row in range(rows):
        losses = [removal_loss(hessian, weight[row], pair) for pair in PAIRS]
        chosen = tuple((~keep[row]).nonzero().flatten().tolist())
        # float32 costs; the tolerance only matters where two pairs tie.
        assert losses[PAIRS.index(chosen)] <= min(losses) * (1 + 1e-3)


def test_errors_are_those_of_columns_dropped_one_after_another():
    factor = random_factor(4, 5)
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(5))
    formed = (drop_forms(factor) @ weight)[12:].view(7, 4, 30)
    for pair, found in zip((*PAIRS, ()), formed, strict=True):
        rest, wanted = weight.double(), torch.zeros(4, 30, dtype=torch.float64)
        for j in pair:
            wanted[j] = rest[j] / factor[j, j].double()
            rest = rest - factor[j].double()[:, None] * wanted[j]
        # Products and a sum in float32 of coefficients rounded once.
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_diagonal_choice_is_sparsegpt():
    factor = random_factor(4, 2)
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    keep = choose_pair(weight, factor, coupled=False)
    score = weight.square() / factor.diagonal()[:, None].square()
    assert torch.equal(keep.T, top2_mask(score.T))


def test_exact_choice_never_costs_more_than_the_diagonal_one():
    factor = random_factor(4, 3)
    weight = torch.randn(4, 500, generator=torch.Generator().manual_seed(3))

    def total(keep):
        out = torch.zeros(500, dtype=torch.float64)
        block = (factor.T @ factor).double()
        for p, q in combinations(range(4), 2):
            index = [p, q]
            w = weight[index].double()
            loss = (w * torch.linalg.solve(block[index][:, index], w)).sum(0)
            out += loss * (~keep[p] & ~keep[q])
        return out

    exact = total(choose_pair(weight, factor))
    diagonal = total(choose_pair(weight, factor, coupled=False))
    assert (exact <= diagonal * (1 + 1e-3) + 1e-6).all()
    assert exact.sum() < diagonal.sum()


def test_single_choice_drops_the_cheapest_of_three():
    factor = random_factor(3, 4)
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(4))
    keep = choose_single(weight, factor)
    inverse = (factor.T @ factor).diagonal()
    cheapest = (weight.square() / inverse[:, None]).argmin(dim=0)
    assert torch.equal((~keep).int().argmax(dim=0), cheapest)
    assert (keep.sum(dim=0) == 2).all()
