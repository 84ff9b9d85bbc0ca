# SPDX-License-Identifier: Apache-2.0
"""Compensation sweep, refit and FP8: losses against their definitions."""

import pytest
import torch

from spense_kernels.errors import PruneError
from spense_kernels.prune import hessian as hessians
from spense_kernels.prune import obs
from spense_kernels.prune.hessian import (
    accumulate,
    add_product,
    bfloat16_parts,
    damp,
    damped_factor,
    dead_inputs,
    inverse_factor,
    symmetrize,
    token_weights,
)
from spense_kernels.prune.mask import PAIRS, is_2to4
from spense_kernels.prune.obs import FP8_MAX, round_to_fp8, sweep
from spense_kernels.prune.refit import refit
from spense_kernels.quant import round_fp8


def problem(n=96, k=160, seed=0, tokens=400):
    """Correlated inputs with a few strong channels, like those of a language model."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    x = torch.randn(tokens, k, generator=generator) @ mix
    x *= torch.exp(torch.randn(k, generator=generator))
    weight = torch.randn(n, k, generator=generator)
    return weight, x.T @ x


def loss(pruned, weight, hessian):
    change = (pruned - weight).double()
    return ((change @ hessian.double()) * change).sum(dim=-1)


def test_factor_gives_the_inverse():
    _, hessian = problem()
    damped, factor, used = damped_factor(hessian, 0.01)
    assert used == 0.01
    assert torch.equal(factor, factor.triu())
    product = factor.double().T @ factor.double() @ damped.double()
    # float32 Cholesky: error about eps * condition number (some 1e4 here) * sqrt(k).
    assert (product - torch.eye(160)).abs().max() < 2**-24 * 1e5 * 160**0.5


def test_accumulate_is_the_weighted_second_moment():
    x = torch.randn(50, 700, generator=torch.Generator().manual_seed(0))
    weight = torch.rand(50, generator=torch.Generator().manual_seed(1))
    hessian = torch.zeros(700, 700)
    accumulate(hessian, x[:20], weight[:20])
    accumulate(hessian, x[20:], weight[20:])
    symmetrize(hessian)
    expected = (x.double() * weight.double()[:, None]).T @ x.double()
    bound = 50 * 2**-23 * float(x.abs().max() ** 2)  # 50 terms, each rounded once or twice
    assert (hessian.double() - expected).abs().max() <= bound
    assert torch.equal(hessian, hessian.T)


def test_products_in_parts_are_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(60, n, generator=generator) for n in (5, 9))
    wanted = 1.0 + a.double().T @ b.double()
    seen = []
    for parts in (1, 4):
        out = torch.ones(7, 12)  # a view of something larger
        monkeypatch.setattr(hessians, "_parts", lambda *given, n=parts: seen.append(given) or n)
        add_product(out[1:6, 2:11], a, b)
        torch.testing.assert_close(out[1:6, 2:11].double(), wanted, rtol=1e-5, atol=1e-5)
        out[1:6, 2:11] = 1.0
        assert out.eq(1.0).all()
    assert [tokens for _, tokens in seen] == [60, 60]


def test_two_bfloat16_parts_are_nearly_the_value():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(5)) * 1e-9
    parts = bfloat16_parts(values)
    assert [part.dtype for part in parts] == [torch.bfloat16] * 2
    whole = parts[0].double() + parts[1].double()
    assert float(((whole - values) / values).abs().max()) <= 2**-17
    exact = values.bfloat16()
    assert len(found := bfloat16_parts(exact)) == 1
    assert torch.equal(found[0], exact)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "columns"), [(4096, 640), (16384, 256), (500, 2500)])
def test_moments_of_bfloat16_on_a_gpu(tokens, columns):
    """Up to 2^-17 from two parts, and what tensor cores cut off their sums, 16 tokens a time."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    weight = torch.rand(tokens, generator=generator) * 1e-6
    out = torch.zeros(columns, columns).cuda()
    accumulate(out, x.cuda(), weight.cuda())
    weighted = x.double() * weight.double()[:, None]
    wanted, size = weighted.T @ x.double(), weighted.abs().T @ x.double().abs()
    assert float(((symmetrize(out).cpu() - wanted) / size).abs().max()) < 2**-14


def test_token_weights_of_a_zero_row():
    y = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert token_weights(y).tolist() == [pytest.approx(1 / 12.5), 0.0]


@pytest.mark.parametrize(("k", "start"), [(160, 160), (160, 112), (640, 480), (160, 0), (70, 54)])
def test_row_loss_is_the_damped_loss(k, start):
    weight, hessian = problem(k=k)
    damped = damp(hessian, 0.01)
    swept = sweep(weight[None], inverse_factor(damped)[None], start)
    direct = loss(swept.weight[0], weight, damped)
    torch.testing.assert_close(swept.row_loss[0].double(), direct, rtol=1e-3, atol=1e-6)
    assert is_2to4(swept.weight[0, :, : start // 4 * 4])
    if start == 0:
        assert torch.equal(swept.weight[0], weight)


def swept_by_columns(weight, factor, start, mask=None, scale=None):
    """The sweep's definition in float64: one column after another, for every row alike.

    The mask of a group is chosen when its first column's turn comes. Returns weight and mask.
    """
    work, u = weight.double().clone(), factor.double()
    keep = torch.ones(weight.shape, dtype=torch.bool) if mask is None else mask
    for j in range(weight.shape[1]):
        if mask is None and j < start and j % 4 == 0:
            # Of the columns not yet visited: what the rows above have left of H^-1.
            block = u[j : j + 4, j : j + 4].T @ u[j : j + 4, j : j + 4]
            losses = []
            for pair in PAIRS:
                w = work[:, [j + i for i in pair]]
                inverse = torch.linalg.inv(block[list(pair)][:, list(pair)])
                losses.append(((w @ inverse) * w).sum(dim=1))
            for row, best in enumerate(torch.stack(losses).argmin(dim=0).tolist()):
                keep[row, [j + i for i in PAIRS[best]]] = False
        kept = work[:, j] * keep[:, j]
        if scale is not None:
            kept = round_to_fp8(kept.float(), scale).double()
        error = (work[:, j] - kept) / u[j, j]
        work[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
        work[:, j] = kept
    return work, keep


@pytest.mark.parametrize(("k", "start"), [(160, 160), (160, 112), (300, 256)])
def test_sweep_against_its_definition(k, start):
    weight, hessian = problem(n=48, k=k)
    factor = inverse_factor(damp(hessian, 0.01))
    swept = sweep(weight[None], factor[None], start)
    wanted, mask = swept_by_columns(weight, factor, start)
    assert torch.equal(swept.mask[0], mask)  # no two pairs of these weights tie
    torch.testing.assert_close(swept.weight[0].double(), wanted, rtol=1e-3, atol=1e-4)
    scale = swept.weight[0].abs().amax(dim=1) / FP8_MAX
    rounded = sweep(swept.weight, factor[None], start, mask=swept.mask, scale=scale[None])
    wanted, _ = swept_by_columns(swept.weight[0], factor, start, mask, scale)
    # A value near the middle of two codes may go the other way, and its row with it.
    rows = (rounded.weight[0].double() - wanted).abs().amax(dim=1) < 1e-4
    assert rows.float().mean() > 0.9
    factors = factor[None]
    both = sweep(weight[None], factors, start, scale=scale[None])  # in one go
    assert is_2to4(both.weight[0, :, :start])
    assert torch.equal(round_to_fp8(both.weight[0], scale[:, None]), both.weight[0])


@pytest.mark.parametrize("k", [64, 65, 66, 67, 3, 1])
def test_short_last_group(k):
    weight, hessian = problem(k=k)
    swept = sweep(weight[None], inverse_factor(damp(hessian, 0.01))[None], k)
    assert is_2to4(swept.weight[0])
    assert swept.mask[0].sum(dim=1).eq(2 * (k // 4) + min(2, k % 4)).all()


def test_rows_of_different_width_match_separate_sweeps():
    weight, hessian = problem()
    factor = inverse_factor(damp(hessian, 0.01))[None]
    starts = torch.tensor([160] * 32 + [96] * 32 + [0] * 32)
    together = sweep(weight[None], factor, starts).weight[0]
    for start, rows in ((160, slice(0, 32)), (96, slice(32, 64)), (0, slice(64, 96))):
        alone = sweep(weight[None, rows], factor, start).weight[0]
        # GEMM shapes differ, so sums may be rounded differently; masks could flip only on ties.
        torch.testing.assert_close(together[rows], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("coupled", [True, False])
def test_losses_at_many_starts_are_those_of_a_sweep_each(coupled, device):
    """Ends inside blocks, at their edges, at none and all columns."""
    weight, hessian = problem(k=400)
    _, factor, _ = damped_factor(hessian, 0.01)
    weight = torch.stack([weight, weight.flip(0)]).to(device)
    factor = torch.stack([factor, 1.5 * factor]).to(device)
    starts = [0, 16, 128, 132, 256, 304, 400]
    found = obs.swept_losses(weight, factor, starts, coupled=coupled)
    assert found.shape == (7, 2, 96)
    for losses, start in zip(found, starts, strict=True):
        expected = sweep(weight, factor, start, coupled=coupled).row_loss
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert bool((found.diff(dim=0) > 0).all())


def test_batch_matches_single():
    a, b = problem(seed=1), problem(seed=2)
    factors = torch.stack([inverse_factor(damp(h, 0.01)) for _, h in (a, b)])
    both = sweep(torch.stack([a[0], b[0]]), factors, 128)
    for i, (weight, _) in enumerate((a, b)):
        alone = sweep(weight[None], factors[i : i + 1], 128)
        torch.testing.assert_close(both.weight[i], alone.weight[0], rtol=1e-4, atol=1e-4)


def test_compensation_beats_masking():
    weight, hessian = problem()
    damped = damp(hessian, 0.01)
    swept = sweep(weight[None], inverse_factor(damped)[None], 160)
    masked = weight * swept.mask[0]
    assert loss(swept.weight[0], weight, damped).sum() < 0.9 * loss(masked, weight, damped).sum()


def test_exact_pair_beats_the_diagonal():
    total = {True: 0.0, False: 0.0}
    for seed in range(5):
        weight, hessian = problem(seed=seed)
        factor = inverse_factor(damp(hessian, 0.01))[None]
        for coupled in total:
            total[coupled] += float(
                sweep(weight[None], factor, 160, coupled=coupled).row_loss.sum()
            )
    assert total[True] < total[False]


def test_dense_last_beats_dense_first():
    """The same dense columns: placed last they take up the error of the sparse ones."""
    for seed in range(3):
        weight, hessian = problem(seed=seed)
        order = (weight.square().sum(0) * hessian.diagonal()).argsort()
        first = torch.cat([order[120:], order[:120]])
        losses = []
        for columns, start, stop in ((order, 0, 120), (first, 40, 160)):
            damped = damp(hessian, 0.01)[columns][:, columns]
            factor = inverse_factor(damped)[None]
            swept = sweep(weight[None][..., columns], factor, stop, sparse_start=start)
            losses.append(float(swept.row_loss.sum()))
        assert losses[0] < losses[1]


def test_refit_never_raises_its_objective():
    weight, hessian = problem()
    swept = sweep(weight[None], inverse_factor(damp(hessian, 0.01))[None], 128)
    ridge = 1e-4 * float(hessian.diagonal().mean())
    own = hessian + ridge * torch.eye(160)
    last = loss(swept.weight[0], weight, own)
    for steps in (1, 2, 5, 10, 30):
        refitted = refit(swept.weight, weight[None], swept.mask, hessian[None], steps)[0]
        now = loss(refitted, weight, own)
        assert (now <= last * (1 + 1e-5)).all()
        assert not refitted[~swept.mask[0]].any()
        last = now
    assert now.sum() < 0.9 * loss(swept.weight[0], weight, own).sum()


@pytest.mark.parametrize("start", [0, 96, 160])
def test_refit_with_dense_columns_eliminated(start):
    """The same minimum as without elimination, reached sooner; rows may differ in width."""
    weight, hessian = problem()
    starts = torch.tensor([start] * 48 + [128] * 48)
    swept = sweep(weight[None], inverse_factor(damp(hessian, 0.01))[None], starts)
    given = swept.weight, weight[None], swept.mask, hessian[None]
    own = hessian + 1e-4 * float(hessian.diagonal().mean()) * torch.eye(160)
    plain = loss(refit(*given, 300)[0], weight, own)
    fast = refit(*given, 20, starts)[0]
    assert not fast[~swept.mask[0]].any()
    assert (loss(fast, weight, own) <= loss(swept.weight[0], weight, own) * (1 + 1e-5)).all()
    assert loss(fast, weight, own).sum() <= plain.sum() * 1.01 + 1e-3


def test_refit_reaches_the_least_squares_solution():
    weight, hessian = problem(n=8, k=32)
    swept = sweep(weight[None], inverse_factor(damp(hessian, 0.01))[None], 32)
    refitted = refit(swept.weight, weight[None], swept.mask, hessian[None], 200)[0]
    h = hessian.double() + 1e-4 * hessian.double().diagonal().mean() * torch.eye(32)
    for row in range(8):
        kept = swept.mask[0, row].nonzero().flatten()
        exact = torch.linalg.solve(h[kept][:, kept], (h @ weight[row].double())[kept])
        # Relative to the row: conjugate gradients in float32 on a problem of condition < 1e5.
        assert (refitted[row, kept] - exact).norm() < 1e-2 * exact.norm()


def test_round_to_fp8_is_torchs_rounding():
    values = torch.randn(64, 80, generator=torch.Generator().manual_seed(0)) * 3
    scale = values.abs().amax(dim=1, keepdim=True) / FP8_MAX * 0.5  # half of each row saturates
    expected = round_fp8(values / scale).float() * scale
    assert torch.equal(round_to_fp8(values, scale), expected)


def test_feedback_beats_plain_rounding_and_keeps_the_mask():
    weight, hessian = problem()
    damped = damp(hessian, 0.01)
    factor = inverse_factor(damped)[None]
    swept = sweep(weight[None], factor, 120)
    scale = swept.weight.abs().amax(dim=-1) / FP8_MAX
    plain = round_to_fp8(swept.weight, scale[..., None])[0]
    spread = sweep(swept.weight, factor, 120, mask=swept.mask, scale=scale).weight[0]
    assert not spread[~swept.mask[0]].any()
    assert torch.equal(round_to_fp8(spread, scale[0, :, None]), spread)  # FP8 values already
    start = swept.weight[0]
    assert loss(spread, start, damped).sum() < 0.8 * loss(plain, start, damped).sum()


def test_dead_inputs_and_damping():
    weight, hessian = problem(k=32)
    hessian[5] = hessian[:, 5] = 0
    assert dead_inputs(hessian).nonzero().tolist() == [[5]]
    damped, factor, used = damped_factor(hessian, 0.01)
    assert used == 0.01
    assert torch.isfinite(factor).all()
    assert torch.isfinite(sweep(weight[None], factor[None], 32).weight).all()
    live = hessian.diagonal()[hessian.diagonal() > 0].mean()
    assert float(damped[5, 5]) == pytest.approx(float(live))


def test_singular_hessian_raises_damping():
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    # Rank 2, and damping far below what float32 can tell from zero.
    damped, factor, used = damped_factor(x.T @ x * 1e4, 1e-9)
    assert used > 1e-9
    assert torch.isfinite(factor).all()
    live = float((x.T @ x * 1e4).diagonal().mean())
    assert float((damped - x.T @ x * 1e4).diagonal().mean()) == pytest.approx(used * live, rel=0.1)


def test_hopeless_hessian_is_an_error():
    with pytest.raises(PruneError, match=r"model\.layers\.3\.down"):
        damped_factor(-torch.eye(8) + 2 * torch.ones(8, 8), 1e-9, "model.layers.3.down", 3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("batch", [1, 3])
def test_blocks_replayed_give_the_same_bits(device, batch, monkeypatch):
    """On the CPU without a graph: what goes in and out of it."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(batch, 40, 400, generator=generator).to(device)
    x = torch.randn(batch, 900, 400, generator=generator).to(device)
    factor = inverse_factor(x.transpose(1, 2) @ x)
    start = torch.tensor([300, 400, 0, 380] * 10, device=device).expand(batch, 40)
    scale = torch.full((batch, 40), 0.01, device=device)

    def both():
        first = obs.sweep(weight, factor, start)
        return first, obs.sweep(first.weight, factor, start, mask=first.mask, scale=scale)

    monkeypatch.setattr(obs, "_repeats", lambda *_: False)
    expected = both()
    count = []

    def repeats(work, first, stop, rules):
        count.append(stop - first == obs.BLOCK)
        return count[-1]

    if device == "cpu":
        monkeypatch.setattr(obs, "_repeats", repeats)
        monkeypatch.setattr(obs, "Replayed", lambda run, name: run)
    else:
        monkeypatch.undo()
    obs._block_graph.cache_clear()
    for _ in range(3):
        for found, wanted in zip(both(), expected, strict=True):
            assert all(
                torch.equal(value, vars(wanted)[name]) for name, value in vars(found).items()
            )
    obs._block_graph.cache_clear()
    assert device != "cpu" or sum(count) == 3 * 6
