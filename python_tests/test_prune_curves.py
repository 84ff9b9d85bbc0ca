# SPDX-License-Identifier: Apache-2.0
"""Losses of rows at every width, and the shares that a staircase chooses from."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from prune_models import make, pruned_tensors, quick, same, tokens_for_calibration

from spense_kernels.errors import PruneError
from spense_kernels.prune import PruneConfig, collect_statistics, plan
from spense_kernels.prune.compress import compress
from spense_kernels.prune.curves import finished_curves, row_curves
from spense_kernels.prune.order import Problem


def problem(shared=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator)
    hessian = x.T @ x / 300
    weights = [torch.randn(n, 64, generator=generator) for n in (200, 130)]
    return Problem("p", weights, hessian if shared else [hessian, 2 * hessian], [])


@pytest.mark.parametrize("shared", [True, False])
def test_each_turn_is_the_loss_of_a_prune_with_its_widths(shared):
    config = quick(admm_steps=4, strategy="staircase")
    given, allowed = problem(shared), [0, 16, 64]
    (found,) = finished_curves([given], allowed, config, [torch.Generator().manual_seed(5)])
    assert found.shape == (3, 330)
    assert not bool(found[-1].any())
    assert bool((found[:-1] > 0).all())
    assert float(found[1].sum()) < float(found[0].sum())
    # The first turn by hand: tiles of both matrices take the widths in turn.
    widths = [torch.tensor([0, 16]), torch.tensor([64, 0])]
    trial = Problem("p", given.weights, given.hessian, widths)
    plain = config.replace(fp8=False)
    solution = compress([trial], plain, [torch.Generator().manual_seed(5)])[0]
    error = (torch.cat(solution.weights) - torch.cat(given.weights)).double()
    for rows, place in ((slice(0, 128), 0), (slice(128, 200), 1), (slice(328, 330), 0)):
        hessian = given.parts[int(rows.start >= 200) if not shared else 0][1].double()
        expected = ((error[rows] @ hessian) * error[rows]).sum(dim=1)
        torch.testing.assert_close(found[place, rows], expected, rtol=1e-4, atol=1e-9)


def test_a_finished_row_loses_less_than_a_swept_one():
    config, given = quick(admm_steps=4, strategy="staircase"), problem()
    swept, finished = (
        make_curves([given], [0, 16, 64], config, [torch.Generator().manual_seed(5)])[0]
        for make_curves in (row_curves, finished_curves)
    )
    assert float(finished[:2].sum()) < 0.9 * float(swept[:2].sum())


def test_curves_reach_the_staircase():
    model, tokens = make("gemma3"), tokens_for_calibration()
    config = quick(strategy="staircase", widths=(0.0, 0.5, 1.0))
    statistics = collect_statistics(model, tokens, config)
    refit = config.replace(curves="refit")
    first = pruned_tensors(model, tokens, refit, statistics=statistics, layers_at_once=2)
    assert same(first, pruned_tensors(model, tokens, refit, statistics=statistics))
    share = [
        float(p.dense_width.double().mean()) / p.weight.shape[1]
        for layer in first.layers for p in layer.values()
    ]  # fmt: skip
    assert 0.0 < sum(share) < len(share)


def test_shares_suit_the_fraction_unless_named():
    assert quick(dense_fraction=0.25).shares == (0.0, 0.25, 0.5, 1.0)
    assert quick(dense_fraction=0.5).shares == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert quick(dense_fraction=0.5, widths=(0.5,)).shares == (0.0, 0.5, 1.0)


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


def test_bad_name():
    with pytest.raises(PruneError, match="curves must be one of"):
        PruneConfig(curves="true")


@pytest.mark.parametrize("changes", [{}, {"curve_refit_steps": 3}, {"score": "obs"}])
def test_curves_of_several_layers_are_those_of_each(changes):
    config = quick(strategy="staircase", **changes)
    both = [problem(), problem()]
    both[1].hessian = both[1].hessian.flip(0, 1)
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    together = row_curves(both, [0, 16, 64], config, seeds)
    for given, found in zip(both, together, strict=True):
        (alone,) = row_curves([given], [0, 16, 64], config, [torch.Generator()])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-6)
