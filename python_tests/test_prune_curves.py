# SPDX-License-Identifier: Apache-2.0
"""Losses of rows at every width, and the shares that a staircase chooses from."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")

from prune_models import pruned_tensors, quick, same

from spense_kernels.prune import collect_statistics, plan
from spense_kernels.prune.compress import compress, row_losses
from spense_kernels.prune.curves import row_curves
from spense_kernels.prune.order import Problem


def test_shares_suit_the_fraction_unless_named():
    assert quick(dense_fraction=0.25).shares == (0.0, 0.25, 0.5, 1.0)
    assert quick(dense_fraction=0.5).shares == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert quick(dense_fraction=0.5, widths=(0.5,)).shares == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("curves", ["refit", "sweep"])
def test_curves_are_what_pruned_rows_lose(curves):
    """Losses against a prune of the whole matrix at that width, and 0 at the last."""
    weight = torch.randn(160, 48, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(0, 1, 160)[torch.randperm(160, generator=torch.Generator())][:, None]
    x = torch.randn(300, 48, generator=torch.Generator().manual_seed(1))
    x = x @ torch.randn(48, 48, generator=torch.Generator().manual_seed(2))
    hessian = x.T @ x
    config = quick(curves=curves, fp8=False, permutation="snake", admm_steps=5)
    problem = Problem("p", [weight], hessian, [])
    widths, seed = [0, 16, 48], torch.Generator()
    found = row_curves([problem], widths, config, [seed])[0]
    assert found.shape == (3, 160)
    assert (found[-1] == 0).all()
    for i, width in enumerate(widths[:-1]):
        same = dataclasses.replace(problem, widths=[torch.tensor([width, width])])
        less = {} if curves == "refit" else {"refit_steps": 0, "admm_steps": 0}
        solved = compress([same], config.replace(**less), [seed])[0].weights[0]
        loss = row_losses(solved - weight, hessian).double()
        # "sweep" counts the damping in; "refit" has all shells, so groups differ a little.
        assert float(found[i].sum()) == pytest.approx(float(loss.sum()), rel=0.25)
        assert torch.corrcoef(torch.stack([found[i], loss]).log())[0, 1] > 0.8
    assert found[1].sum() < found[0].sum()


@pytest.mark.parametrize("shared", [True, False])
def test_each_turn_is_the_loss_of_a_prune_with_its_widths(shared):
    """The first turn by hand: tiles of both matrices take the widths in turn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator)
    hessian = x.T @ x / 300
    weights = [torch.randn(n, 64, generator=generator) for n in (200, 130)]
    given = Problem("p", weights, hessian if shared else [hessian, 2 * hessian], [])
    config = quick(admm_steps=4, strategy="staircase", curves="refit")
    found = row_curves([given], [0, 16, 64], config, [torch.Generator().manual_seed(5)])[0]
    assert found.shape == (3, 330)
    trial = dataclasses.replace(given, widths=[torch.tensor([0, 16])] * 2)
    plain = config.replace(fp8=False)
    solution = compress([trial], plain, [torch.Generator().manual_seed(5)])[0]
    error = (torch.cat(solution.weights) - torch.cat(weights)).double()
    for first, last, place in ((0, 128, 0), (128, 200, 1), (200, 328, 0), (328, 330, 1)):
        own = hessian.double() * (1 if shared or first < 200 else 2)
        expected = ((error[first:last] @ own) * error[first:last]).sum(dim=1)
        torch.testing.assert_close(found[place, first:last], expected, rtol=1e-4, atol=1e-9)


def test_curves_decide_the_widths(gemma, tokens, gemma_statistics):
    made = [
        pruned_tensors(
            gemma, tokens, quick(strategy="staircase", curves=curves), statistics=gemma_statistics
        )
        for curves in ("refit", "sweep")
    ]
    for keep in made:
        splits = [m.split for layer in keep.layers for m in layer.values()]
        dense = sum(s.dense_fraction * s.n * s.k for s in splits) / sum(s.n * s.k for s in splits)
        assert 0.2 < dense <= 0.25
    assert not same(*made)


def test_curves_serve_the_next_fraction(gemma, tokens, monkeypatch):
    """Kept in the statistics for other fractions with the same shares, and nothing else."""
    statistics = collect_statistics(gemma, tokens, quick(strategy="staircase"))
    made = []
    real = plan.row_curves
    monkeypatch.setattr(plan, "row_curves", lambda *given: made.append(1) or real(*given))

    def run(**changes):
        made.clear()
        config = quick(strategy="staircase", **changes)
        found = pruned_tensors(gemma, tokens, config, statistics=statistics)
        return found, len(made)

    first, worked = run(dense_fraction=0.25)
    assert worked > 0
    assert run(dense_fraction=0.125)[1] == 0
    assert run(dense_fraction=0.5)[1] == worked  # other shares
    assert run(refit_steps=3)[1] == worked
    again, worked = run(dense_fraction=0.25)
    assert worked == 0
    assert same(first, again)
