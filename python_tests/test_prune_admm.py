# SPDX-License-Identifier: Apache-2.0
"""The mask search by alternating directions: legal masks, and no row that loses more."""

import pytest
import torch
from test_prune_obs import loss, problem

from spense_kernels.errors import PruneError
from spense_kernels.prune.admm import newton_inverse, search_mask
from spense_kernels.prune.blocks import blocks
from spense_kernels.prune.compress import compress
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.hessian import damp, inverse_factor
from spense_kernels.prune.mask import is_2to4
from spense_kernels.prune.obs import sweep
from spense_kernels.prune.order import Problem
from spense_kernels.prune.refit import eliminated, refit


def search_rows(weight, target, mask, hessian, steps, starts):
    """The search on all rows [B, N, K], part by part: weights and mask."""
    weight, mask = weight.clone(), mask.clone()
    for part in eliminated(hessian, starts):
        rows = [part.block.take(values) for values in (weight, target, mask)]
        found, kept = search_mask(part, *rows, steps)
        part.block.put(weight, found)
        part.block.put(mask, kept)
    return weight, mask


def searched(k, starts, steps):
    """Weight, Hessian, the sweep's result and the search's on rows with these dense starts."""
    weight, hessian = problem(n=len(starts), k=k)
    starts = torch.tensor(starts)
    swept = sweep(weight[None], inverse_factor(damp(hessian, 0.01))[None], starts)
    given = swept.weight, weight[None], swept.mask, hessian[None], steps, starts[None]
    found, mask = search_rows(*given)
    return weight, hessian, swept, (found[0], mask[0])


@pytest.mark.parametrize("steps", [1, 5, 7, 30])
@pytest.mark.parametrize(("k", "starts"), [
    (160, [160] * 96), (160, [120] * 48 + [80] * 32 + [160] * 8 + [0] * 8), (32, [4] * 96),
])  # fmt: skip
def test_mask_is_2to4_and_dense_columns_stay(k, starts, steps):
    _, _, _, (weight, mask) = searched(k, starts, steps)
    for row, start in enumerate(starts):
        assert mask[row, :start].view(-1, 4).sum(dim=1).eq(2).all()
        assert mask[row, start:].all()
    for start in set(starts):
        rows = [i for i, s in enumerate(starts) if s == start]
        assert is_2to4(weight[rows, :start])
    assert not weight[~mask].any()


def test_no_steps_and_short_groups_keep_the_sweeps_choice():
    _, _, swept, (weight, mask) = searched(70, [70] * 40, 30)  # 70 = 17 groups and two columns
    assert torch.equal(mask, swept.mask[0])
    assert torch.equal(weight, swept.weight[0])


def test_dead_inputs_do_no_harm():
    weight, hessian = problem(k=32)
    hessian[5] = hessian[:, 5] = 0
    starts = torch.full((96,), 24)
    swept = sweep(weight[None], inverse_factor(damp(hessian, 0.01))[None], starts)
    given = swept.weight, weight[None], swept.mask, hessian[None], 10, starts[None]
    found, mask = search_rows(*given)
    assert torch.isfinite(found).all()
    assert mask[0, :, :24].reshape(96, -1, 4).sum(dim=-1).eq(2).all()


@pytest.mark.parametrize("widths", [[0], [32], [48]])
def test_no_row_loses_more_and_the_matrix_loses_less(widths):
    weight, hessian = problem()
    losses = {}
    for steps in (0, 30):
        config = PruneConfig(permutation="snake", fp8=False, admm_steps=steps)
        task = Problem("p", [weight], hessian, [torch.tensor(widths)])
        solution = compress([task], config, [torch.Generator().manual_seed(0)])[0]
        losses[steps] = loss(solution.weights[0], weight, hessian)
        order = solution.k_perm.flatten().long()
        assert is_2to4(solution.weights[0][:, order[: 160 - widths[0]]])
    # The choice is made on float32 losses, so rows that tie may differ by their rounding.
    assert (losses[30] <= losses[0] * (1 + 1e-4)).all()
    assert losses[30].sum() < 0.97 * losses[0].sum()


def test_blocks_hold_every_row_once():
    """Rows of every start, in the matrices that have it; short ones are padded and not written."""
    starts = torch.tensor([[8, 8, 4, 0], [8, 8, 8, 8], [4, 4, 4, 0]])
    values = torch.rand(3, 4, 8)
    out = torch.zeros_like(values)
    found = blocks(starts)
    assert [block.start for block in found] == [0, 4, 8]
    for block in found:
        taken = block.take(values)
        assert (block.take(starts) == block.start).all()
        assert block.of(values).shape[0] == len(block.which)
        if block.valid is not None:
            taken[~block.valid] = torch.nan  # must not arrive
        block.put(out, taken)
    assert torch.equal(out, values)
    assert found[1].of(values)[1].equal(values[2])
    assert blocks(torch.full((2, 4), 8))[0].valid is None


@pytest.mark.parametrize("growth", [1.1, 1.46, 1.9])
def test_newton_inverse_from_the_pull_before(growth):
    hessian = torch.stack([problem(seed=s)[1] for s in range(2)]).double()
    root = hessian.diagonal(dim1=-2, dim2=-1).sqrt()[:, None]
    scaled, eye = hessian / root / root.transpose(1, 2), torch.eye(160, dtype=torch.float64)
    # Not torch.linalg.inv: once torch.set_num_threads was called, its batched LU on a CPU fails.
    before = torch.cholesky_inverse(torch.linalg.cholesky(scaled + 0.3 * eye))
    wanted = torch.cholesky_inverse(torch.linalg.cholesky(scaled + 0.3 * growth * eye))
    found = newton_inverse(scaled + 0.3 * growth * eye, before)
    assert (found - wanted).norm() <= 2 * (growth - 1) ** 16 * wanted.norm() + 1e-10


def test_rows_of_mixed_starts_search_as_each_matrix_alone():
    weights, hessians = zip(*[problem(seed=s) for s in range(2)], strict=True)
    starts = torch.tensor([[160] * 64 + [120] * 32, [80] * 64 + [160] * 32])
    targets, hessian = torch.stack(weights), torch.stack(hessians)
    factor = torch.stack([inverse_factor(damp(h, 0.01)) for h in hessians])
    swept = sweep(targets, factor, starts)
    both, masks = search_rows(swept.weight, targets, swept.mask, hessian, 10, starts)
    fitted = refit(both, targets, masks, hessian, 5, starts)
    for i in range(2):
        one = slice(i, i + 1)
        given = swept.weight[one], targets[one], swept.mask[one], hessian[one], 10, starts[one]
        alone, mask = search_rows(*given)
        assert torch.equal(mask, masks[one])
        torch.testing.assert_close(alone, both[one], rtol=1e-4, atol=1e-5)
        again = refit(alone, targets[one], mask, hessian[one], 5, starts[one])
        torch.testing.assert_close(again, fitted[one], rtol=1e-3, atol=1e-4)


def test_layers_together_search_alike():
    """A batch of problems gets what each gets alone."""
    problems = [Problem(str(s), [w], h, [torch.tensor([32])])
                for s in range(2) for w, h in [problem(seed=s)]]  # fmt: skip
    config = PruneConfig(permutation="none", fp8=False, admm_steps=10)

    def run(some):
        return compress(some, config, [torch.Generator().manual_seed(0) for _ in some])

    together = run(problems)
    for one, both in zip(problems, together, strict=True):
        alone = run([one])[0].weights[0]
        assert (alone - both.weights[0]).norm() <= 1e-3 * alone.norm()


def nearly_singular(share, strong=1, k=512):
    """Weights, a Hessian that one direction of `strong` channels holds nearly all of, rounded as
    sums of many tokens are (to a share of each entry), and it without rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, k, generator=generator) * 0.1
    direction = torch.randn(k, generator=generator)
    direction[strong:] = 0
    x[::10] += 100 * direction + 5 * torch.randn(1, k, generator=generator)
    exact = x.double().T @ x.double()
    rounding = torch.rand(k, k, generator=generator, dtype=torch.float64).triu()
    hessian = (exact * (1 - share * (rounding + rounding.triu(1).T))).float()
    order = hessian.diagonal().argsort()
    weight = torch.randn(48, k, generator=generator)
    return weight, hessian[order][:, order], exact[order][:, order]


def test_hessians_without_their_dense_columns_are_damped_until_they_are_positive_definite():
    """Only those that need it, and as much as they need; the others stay as they were."""
    _, hessian, _ = nearly_singular(2.0**-9, strong=8)
    healthy = problem(k=512, tokens=2000)[1]
    starts = torch.full((2, 48), 384)
    (part,) = eliminated(torch.stack([healthy, hessian]), starts)
    assert float(part.damping[0]) == pytest.approx(1e-4)
    assert float(part.damping[1]) > 5e-4
    (alone,) = eliminated(healthy[None], starts[:1])
    assert alone.damping is None
    torch.testing.assert_close(part.reduced[0], alone.reduced[0], rtol=1e-4, atol=1e-4)
    diagonal = part.reduced.diagonal(dim1=-2, dim2=-1)
    assert (diagonal > 0).all()
    root = diagonal.double().sqrt()[:, None]
    least = torch.linalg.eigvalsh(part.reduced.double() / root / root.transpose(1, 2))[:, 0]
    assert (least > -0.1 - 1e-3).all()


@pytest.mark.parametrize(("share", "strong"), [
    (2.0**-9, 8), (2.0**-12, 1),  # no Cholesky factor of the dense columns
    (2.0**-14, 1),  # a factor, but what is left of H without them is noise
])  # fmt: skip
def test_a_nearly_singular_hessian_is_pruned_and_the_solution_says_so(share, strong):
    weight, hessian, exact = nearly_singular(share, strong)
    task = Problem("p", [weight], hessian, [torch.tensor([128])])
    config = PruneConfig(admm_steps=30, fp8=False)
    solution = compress([task], config, [torch.Generator().manual_seed(0)])[0]
    assert solution.refit_damping > 5e-4
    assert torch.isfinite(solution.weights[0]).all()
    plain = compress(
        [task], config.replace(admm_steps=0, refit_steps=0), [torch.Generator().manual_seed(0)]
    )[0]
    assert plain.refit_damping == 0.0
    # On the Hessian as it is without rounding: on the rounded one a loss can be negative.
    lost = [loss(found.weights[0], weight, exact).sum() for found in (solution, plain)]
    assert lost[0] < 1.05 * lost[1]  # what the refit could gain is less than the rounding


def test_a_hopeless_hessian_is_an_error_of_its_name():
    _, healthy = problem(k=32)
    hopeless = healthy - 1e9 * torch.ones(32, 32) + 1e9 * torch.eye(32)
    with pytest.raises(PruneError, match=r"layers\.3\.down: H without its last 8 columns"):
        next(eliminated(torch.stack([healthy, hopeless]), torch.full((2, 4), 24),
                        names=["layers.3.up", "layers.3.down"]))  # fmt: skip
