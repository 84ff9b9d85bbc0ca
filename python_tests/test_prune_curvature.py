# SPDX-License-Identifier: Apache-2.0
"""What H is made of (sinks, shrinkage), and the row orders that leave a layer's function alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from prune_models import (
    FAMILIES,
    Keep,
    make,
    pruned_tensors,
    quick,
    same,
)
from torch import nn

from spense_kernels.errors import PruneError
from spense_kernels.prune import collect_statistics, prune_model, shallow_clone
from spense_kernels.prune.compress import compress
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.groups import Group
from spense_kernels.prune.hessian import shrunk
from spense_kernels.prune.plan import Curvature, LayerPlan
from spense_kernels.prune.reorder import reader_order, sort_in_shards, value_heads
from spense_kernels.prune.sensitivity import Gradients
from spense_kernels.prune.tasks import layer_tasks


def second_moment(tokens=300, k=48, seed=0):
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed))
    return x.T @ x


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_shrinkage_scales_all_but_the_diagonal(share):
    hessian = second_moment()
    given = hessian.clone()
    found = shrunk(hessian, share)
    off = ~torch.eye(48, dtype=torch.bool)
    assert torch.equal(found.diagonal(), given.diagonal())
    torch.testing.assert_close(found[off], given[off] * (1 - share), rtol=2**-22, atol=0)
    assert torch.equal(found, found.T)
    torch.linalg.cholesky(found)  # positive definite stays so


def test_shrinkage_makes_a_singular_hessian_regular():
    x = torch.randn(8, 48, generator=torch.Generator().manual_seed(0)).double()
    hessian = x.T @ x
    assert torch.linalg.eigvalsh(hessian)[0] < 1e-9
    assert torch.linalg.eigvalsh(shrunk(hessian, 0.1))[0] > 0.05 * hessian.diagonal().min()


def test_shrinkage_reaches_every_projection(gemma, tokens, gemma_statistics):
    plain, strong = (
        pruned_tensors(gemma, tokens, quick(shrinkage=share), statistics=gemma_statistics)
        for share in (0.0, 0.5)
    )
    for one, two in zip(plain.layers, strong.layers, strict=True):
        for name in one:
            assert not torch.equal(one[name].weight, two[name].weight), name


def test_sinks_add_the_first_tokens_to_a_mean_hessian(gemma, tokens, gemma_statistics):
    """Curvature of a projection against its definition."""
    groups = gemma_statistics.layers[0].groups
    hessians, gradients = gemma_statistics.layers[0].hessians, gemma_statistics.gradients
    prefix, count = "model.layers.0.", tokens.numel()
    curvature = Curvature(gradients, count, quick())
    for group in groups:
        found = curvature.of(group, hessians, prefix, "cpu")
        parts = found if isinstance(found, list) else [found]
        assert len(parts) == len(group.modules)
        for name, part in zip(group.modules, parts, strict=True):
            sinks = gradients.sinks[prefix + name].double()
            assert sinks.shape == (2, group.k)  # sensitivity_sequences of the quick settings
            plain = hessians[group.name].double() / count / gradients.norm_mean[prefix + name]
            expected = plain + sinks.T @ sinks
            assert (part.double() - expected).norm() <= 1e-5 * expected.norm()
    without = Curvature(gradients, count, quick(sinks=False)).of(groups[1], hessians, prefix, "cpu")
    mean = gradients.norm_mean[prefix + groups[1].name]
    torch.testing.assert_close(without, hessians[groups[1].name] / (mean * count))


def test_a_heavy_sink_is_kept_by_the_pruned_layer():
    """One direction that the loss hangs on: its output error falls by far, for little elsewhere."""
    torch.manual_seed(0)
    layer = nn.Module()
    layer.q_proj = nn.Linear(48, 64, bias=False).requires_grad_(False)
    group = Group(("q_proj",), 48)
    hessian, sink = second_moment(), 3 * torch.randn(1, 48)
    gradients = Gradients(sinks={"q_proj": 10 * sink}, norm_mean={"q_proj": 1.0})
    plan = LayerPlan({"q_proj": torch.tensor([0])})
    errors, rest = {}, {}
    for sinks in (False, True):
        config = PruneConfig(sinks=sinks, fp8=False, permutation="none")
        curvature = Curvature(gradients, 300, config)
        task = layer_tasks(0, layer, [group], {"q_proj": hessian}, plan, curvature, "", "cpu")[0]
        solved = compress([task.problem], config, [torch.Generator()])[0].weights[0]
        change = solved - layer.q_proj.weight
        errors[sinks] = float((change @ sink.T).square().sum())
        rest[sinks] = float(((change @ hessian) * change).sum())
    assert errors[True] < 0.05 * errors[False]
    assert rest[True] < 1.3 * rest[False]


def test_sinks_need_statistics_with_gradients(gemma, tokens):
    plain = collect_statistics(gemma, tokens, quick(sinks=False))
    assert plain.gradients is None
    with pytest.raises(PruneError, match="sensitivity"):
        prune_model(gemma, tokens, quick(), statistics=plain, on_layer=Keep())


def test_sinks_switch_off(gemma, tokens, gemma_statistics):
    """Without sinks the gradients in the statistics change nothing."""
    plain = collect_statistics(gemma, tokens, quick(sinks=False))
    config = quick(sinks=False)
    given = pruned_tensors(gemma, tokens, config, statistics=plain)
    assert same(given, pruned_tensors(gemma, tokens, config, statistics=gemma_statistics))
    on = pruned_tensors(gemma, tokens, quick(), statistics=gemma_statistics)
    assert not same(given, on)


def test_reader_order_follows_the_heads_of_the_values():
    order = sort_in_shards(torch.tensor([0.0, 1, 2, 3, 2, 3, 0, 1]), 2)
    assert order.tolist() == [3, 2, 1, 0, 5, 4, 7, 6]
    # Two query heads read each value head.
    expected = [3, 2, 1, 0, 7, 6, 5, 4, 9, 8, 11, 10, 13, 12, 15, 14]
    assert reader_order(order, 16, 4).tolist() == expected


@pytest.mark.parametrize("family", list(FAMILIES))
def test_sorted_value_rows_leave_the_model_alone(family, tokens):
    """v's rows move inside their heads and o's columns follow: the logits stay."""
    model = make(family)
    statistics = collect_statistics(model, tokens, quick())
    target = shallow_clone(model)
    generator = torch.Generator().manual_seed(0)
    for index, layer in enumerate(target.model.layers):
        groups = statistics.layers[index].groups
        heads = value_heads(layer, groups)
        assert [(h.value, h.out, h.head_dim) for h in heads] == [
            ("self_attn.v_proj", "self_attn.o_proj", 12)
        ]
        value, out = (layer.get_submodule(m) for m in (heads[0].value, heads[0].out))
        keys = torch.rand(value.out_features, generator=generator)
        order = sort_in_shards(keys, value.out_features // 12)
        assert not torch.equal(order, torch.arange(len(order)))
        columns = reader_order(order, out.in_features, 12)
        value.weight = nn.Parameter(value.weight[order], requires_grad=False)
        if value.bias is not None:
            value.bias = nn.Parameter(value.bias[order], requires_grad=False)
        out.weight = nn.Parameter(out.weight[:, columns], requires_grad=False)
    expected, got = model(tokens).logits, target(tokens).logits
    # The sums of o run in another order: float32 rounding of logits of order one.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_plan_moves_value_rows_and_their_reader(gemma, tokens, gemma_statistics):
    """All dense but for the last tiles, the pruned attention computes what the dense one does."""
    config = quick(
        strategy="staircase", dense_fraction=0.999, widths=(0.0, 1.0), fp8=False, refit_steps=0
    )
    target = shallow_clone(gemma)
    prune_model(target, tokens, config, statistics=gemma_statistics)
    exact = 0
    for old, new in zip(gemma.model.layers, target.model.layers, strict=True):
        before, after = old.self_attn, new.self_attn
        assert not torch.equal(before.v_proj.weight, after.v_proj.weight)
        for head in range(2):
            rows = slice(12 * head, 12 * head + 12)
            kept = {tuple(r.tolist()) for r in after.v_proj.weight[rows]}
            exact += kept == {tuple(r.tolist()) for r in before.v_proj.weight[rows]}
    assert exact >= 2  # at most one tile of the model is sparse: one layer's v is exact
    assert (gemma(tokens).logits - target(tokens).logits).square().mean() < 0.05
