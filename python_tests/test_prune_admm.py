# SPDX-License-Identifier: Apache-2.0
"""The mask search by alternating directions: legal masks, and no row that loses more."""

import pytest
import torch
from test_prune_obs import loss, problem

from spense_kernels.prune.admm import search_mask
from spense_kernels.prune.compress import compress
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.hessian import damp, inverse_factor
from spense_kernels.prune.mask import is_2to4
from spense_kernels.prune.obs import sweep
from spense_kernels.prune.order import Problem


def searched(k, starts, steps):
    """Weight, Hessian, the sweep's result and the search's on rows with these dense starts."""
    weight, hessian = problem(n=len(starts), k=k)
    starts = torch.tensor(starts)
    swept = sweep(weight[None], inverse_factor(damp(hessian, 0.01))[None], starts)
    found = search_mask(swept.weight[0], weight, swept.mask[0], hessian, steps, starts)
    return weight, hessian, swept, found


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
    found, mask = search_mask(swept.weight[0], weight, swept.mask[0], hessian, 10, starts)
    assert torch.isfinite(found).all()
    assert mask[:, :24].reshape(96, -1, 4).sum(dim=-1).eq(2).all()


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
