# SPDX-License-Identifier: Apache-2.0
"""Order of the columns, dense widths and their budget."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spense_kernels.errors import PruneError
from spense_kernels.format import Split
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.order import Problem, choose_orders, gather_order, rank_columns
from spense_kernels.prune.permute import (
    retained,
    search,
    snake,
    split_values,
)
from spense_kernels.prune.saliency import column_scores
from spense_kernels.prune.widths import (
    TileCosts,
    allocate,
    round_width,
    tile_sums,
    width_list,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def heavy_tailed(rows, columns, seed=0):
    return torch.exp(2 * torch.randn(rows, columns, generator=generator(seed)))


def test_snake_deals_strong_and_weak_together():
    assert snake(torch.arange(8)).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    assert snake(torch.arange(11)).tolist() == [0, 3, 4, 7, 1, 2, 5, 6, 8, 9, 10]
    assert snake(torch.arange(3)).tolist() == [0, 1, 2]


def test_split_values_against_definition():
    saliency = heavy_tailed(17, 8)
    values = split_values(saliency.T.contiguous(), torch.arange(8)[None])[:, 0]
    expected = []
    for first in product(range(8), repeat=4):
        if first[0] == 0 and list(first) == sorted(set(first)):
            rest = [c for c in range(8) if c not in first]
            expected.append(float(retained(saliency[:, [*first, *rest]])))
    torch.testing.assert_close(values.double(), torch.tensor(expected, dtype=torch.float64),
                               rtol=1e-6, atol=0)  # fmt: skip
    assert len(expected) == 35


def test_splits_of_many_eights_are_those_of_each():
    eight = torch.randperm(40, generator=generator())[:40].view(5, 8)
    columns = heavy_tailed(17, 40).T.contiguous()
    each = torch.cat([split_values(columns, one[None]) for one in eight], dim=1)
    together = split_values(columns, eight)
    torch.testing.assert_close(together, each, rtol=17 * 2**-23, atol=0)  # sums of 17 in any order
    assert split_values(columns, eight[:0]).shape == (35, 0)


def searched(saliency, segments, rounds):
    return search([saliency], [segments], rounds, [generator()])[0]


def test_search_never_lowers_the_retained_saliency():
    saliency = heavy_tailed(40, 96)
    last = float(retained(saliency))
    for rounds in (0, 1, 5, 20, 80):
        order = searched(saliency, [(0, 96)], rounds)
        assert sorted(order.tolist()) == list(range(96))
        now = float(retained(saliency[:, order]))
        assert now >= last * (1 - 1e-6)
        last = now
    assert now > 1.005 * float(retained(saliency))


def test_search_beats_snake_dealing():
    saliency = heavy_tailed(64, 128, seed=3) * torch.logspace(0, 3, 128)
    dealt = snake(saliency.sum(0).argsort(descending=True))
    saliency = saliency[:, dealt]
    found = searched(saliency, [(0, 128)], 60)
    assert float(retained(saliency[:, found])) > float(retained(saliency))


def test_search_finds_the_optimum_of_a_small_case():
    """Eight columns in two groups: one round tries all 35 splits."""
    saliency = heavy_tailed(9, 8, seed=5)
    order = searched(saliency, [(0, 8)], 1)
    best = split_values(saliency.T.contiguous(), torch.arange(8)[None]).max()
    assert float(retained(saliency[:, order])) == pytest.approx(float(best), rel=1e-6)


def test_search_stays_inside_segments():
    saliency = heavy_tailed(20, 70)
    segments = [(0, 16), (16, 48), (48, 54)]  # the last holds one group and two odd columns
    order = searched(saliency, segments, 20)
    for first, last in segments:
        assert sorted(order[first:last].tolist()) == list(range(first, last))
    assert order[52:].tolist() == list(range(52, 70))


def test_matrices_together_get_the_orders_that_each_gets_alone():
    saliencies = [heavy_tailed(20, 70, seed=s) for s in range(3)]
    segments = [[(0, 70)], [(0, 16), (16, 48)], [(0, 4)]]  # the last has nothing to exchange
    together = search(saliencies, segments, 20, [generator(s) for s in range(3)])
    for i, found in enumerate(together):
        alone = search([saliencies[i]], [segments[i]], 20, [generator(i)])[0]
        assert torch.equal(found, alone)
    assert together[2].tolist() == list(range(70))
    assert together[1][48:].tolist() == list(range(48, 70))


@pytest.mark.parametrize("permutation", ["none", "snake", "search"])
@pytest.mark.parametrize(("k", "k_shards", "widths"), [
    (160, 1, [[32, 32], [32]]), (160, 1, [[0, 160], [48]]), (160, 5, [[16, 0], [32]]),
    (70, 1, [[16, 16], [16]]), (70, 1, [[70, 16], [0]]), (24, 1, [[0, 0], [0]]),
])  # fmt: skip
def test_order_is_a_legal_split(permutation, k, k_shards, widths):
    """Shells hold the right columns, and Split's own order is the one that was swept."""
    weight = torch.randn(256, k, generator=generator())
    x = torch.randn(300, k, generator=generator(1)) * torch.rand(k, generator=generator(2))
    hessian = x.T @ x
    parts = [weight[:200], weight[:100]]
    problem = Problem("p", parts, hessian, [torch.tensor(w) for w in widths], k_shards)
    config = PruneConfig(permutation=permutation, search_rounds=5, search_rows=64)
    dense = torch.cat(parts)
    starts = torch.full((300,), k)
    (k_perm,), _ = choose_orders([problem], [dense], [starts], config, [generator()])
    distinct = sorted({w for part in widths for w in part})
    scores = column_scores("wanda", dense, hessian)
    for shard in range(k_shards):
        size = k // k_shards
        local = scores[shard * size : (shard + 1) * size]
        ranking = local.argsort(stable=True).tolist()
        for width in distinct:
            assert set(k_perm[shard, size - width :].tolist()) == set(ranking[size - width :])
    split = Split(200, k, k_perm, torch.tensor(widths[0]))
    if len(set(widths[0])) == len(distinct):
        assert split.gather().tolist() == gather_order(k_perm, distinct).tolist()


def test_rank_columns_none_keeps_the_sparse_columns_in_place():
    scores = torch.tensor([5.0, 1, 4, 2, 9, 3, 8, 7] * 4)
    order = rank_columns(scores, [16], 1, "none")[0]
    assert order[:16].tolist() == sorted(order[:16].tolist())


@pytest.mark.parametrize("kind", ["wanda", "activation", "obs"])
def test_activation_aware_columns_beat_random_ones(kind):
    """Columns with strong inputs must stay dense: loss of the 2:4 part with the same widths."""
    from spense_kernels.prune.compress import compress

    n, k = 64, 128
    x = torch.randn(512, k, generator=generator()) @ (
        torch.eye(k) + 0.3 * torch.randn(k, k, generator=generator(1))
    )
    x *= torch.exp(1.5 * torch.randn(k, generator=generator(2)))
    weight = torch.randn(n, k, generator=generator(3))
    errors = {}
    for score in (kind, "random"):
        problem = Problem("p", [weight], x.T @ x, [torch.tensor([32])])
        config = PruneConfig(score=score, permutation="none", refit_steps=0, fp8=False)
        errors[score] = compress([problem], config, [generator()])[0].errors[0]
    assert errors[kind] < 0.8 * errors["random"]


@pytest.mark.parametrize(("share", "columns", "width"), [
    (0.25, 640, 160), (0.125, 640, 80), (0.5, 1024, 512), (0.0, 640, 0), (1.0, 70, 70),
    (0.99, 70, 70), (0.95, 70, 64), (0.99, 64, 64), (0.25, 24, 0), (0.4, 24, 16),
    (0.5, 16, 16), (0.4, 16, 0), (1.0, 16, 16),
])  # fmt: skip
def test_round_width(share, columns, width):
    assert round_width(share, columns) == width
    Split.uniform(8, columns, width)  # legal


def test_round_width_agrees_with_split():
    for columns in (64, 70, 640, 1024):
        for d in (0.0, 0.125, 0.25, 0.5, 0.6, 0.99, 1.0):
            assert Split.from_fraction(8, columns, d).widths == [round_width(d, columns)]


def test_width_list_is_sorted_and_distinct():
    assert width_list((1.0, 0.0, 0.25, 0.26), 64) == [0, 16, 64]


def test_tile_sums_of_a_ragged_last_tile():
    assert tile_sums(torch.ones(2, 300)).tolist() == [[128.0, 128.0, 44.0]] * 2


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_allocation_is_near_the_best_and_inside_its_budget(seed):
    gen = generator(seed)
    tables, tiles = [], 3
    for _ in range(2):
        cost = torch.rand(3, tiles, generator=gen, dtype=torch.float64)
        cost = cost.sort(dim=0, descending=True).values
        cost[-1] = 0
        weights = torch.tensor([0.0, 16.0, 64.0], dtype=torch.float64)[:, None].expand(3, tiles)
        tables.append(TileCosts(cost, weights.clone()))
    budget = float(torch.randint(0, 400, (1,), generator=gen))

    def value(choice):
        picked = zip(tables, choice, strict=True)
        return sum(float(t.cost.gather(0, c[None]).sum()) for t, c in picked)

    def spent(choice):
        picked = zip(tables, choice, strict=True)
        return sum(float(t.weights.gather(0, c[None]).sum()) for t, c in picked)

    chosen = allocate(tables, budget)
    assert spent(chosen) <= budget
    best = min(
        value(choice)
        for flat in product(range(3), repeat=6)
        if spent(choice := list(torch.tensor(flat).view(2, 3))) <= budget
    )
    # A multiplier plus greedy filling may miss by what one tile could still save.
    slack = max(float(t.cost.max()) for t in tables)
    assert value(chosen) <= best + slack


def test_allocation_extremes_and_impossible_budget():
    table = TileCosts(torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.tensor([[16.0, 16], [64, 64]]))
    assert allocate([table], 128.0)[0].tolist() == [1, 1]
    assert allocate([table], 32.0)[0].tolist() == [0, 0]
    assert allocate([table], 80.0)[0].tolist() == [1, 0]
    with pytest.raises(PruneError, match="budget"):
        allocate([table], 31.0)


def test_matrices_with_fewer_widths_than_others():
    """A budget for every tile but one: what is left out is the cheapest of the narrow ones."""
    wide = TileCosts(torch.tensor([[9.0], [4.0], [0.0]]), torch.tensor([[16.0], [32], [64]]))
    narrow = TileCosts(torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.tensor([[16.0, 16], [64, 64]]))
    assert [c.tolist() for c in allocate([narrow, wide], 192.0)] == [[1, 1], [2]]
    assert [c.tolist() for c in allocate([narrow, wide], 144.0)] == [[1, 0], [2]]
    assert [c.tolist() for c in allocate([narrow, wide], 64.0)] == [[0, 0], [1]]
