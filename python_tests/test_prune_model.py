# SPDX-License-Identifier: Apache-2.0
"""prune_model on tiny models of four families: end to end, statistics, baselines, options."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from prune_models import (
    FAMILIES,
    Keep,
    distance,
    make,
    pruned_tensors,
    quick,
    same,
)

from spense_kernels import prune
from spense_kernels.errors import PruneError
from spense_kernels.linear import SpenseLinear
from spense_kernels.prune import collect_statistics, prune_model, shallow_clone
from spense_kernels.prune.calibrate import LayerWalk
from spense_kernels.prune.mask import is_2to4
from spense_kernels.prune.sensitivity import CLIP, collect_gradients
from spense_kernels.quant import quantize_weight


@pytest.mark.parametrize("strategy", ["uniform", "staircase"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_end_to_end(family, strategy, tokens):
    model = make(family)
    target = shallow_clone(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    steps = {"uniform": 0, "staircase": 6}[strategy]
    report = prune_model(target, tokens, quick(strategy=strategy, admm_steps=steps))
    linears = [m for m in target.modules() if isinstance(m, SpenseLinear)]
    assert len(linears) == len(report.modules) == 2 * 7
    assert isinstance(target.lm_head, nn.Linear)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    for entry in report.modules:
        assert 0 < entry.relative_error < 0.3, entry.name
        weight = target.get_submodule(entry.name).hybrid_weight()
        assert is_2to4(sparse_part(weight))
    assert report.dense_fraction <= 0.25 + (0.15 if strategy == "uniform" else 1e-9)
    assert json.loads(json.dumps(report.to_json()))["modules"][0]["name"].endswith("q_proj")
    out = target(tokens).logits
    assert torch.isfinite(out).all()
    # Pruned is close to dense compared with how far outputs spread.
    assert distance(model, target, tokens) < 0.5 * float(model(tokens).logits.var())


def sparse_part(weight) -> torch.Tensor:
    """Floats of tile 0's sparse columns in the gather order."""
    split = weight.split
    stop = split.k - split.k_shards * split.widths[0]
    return weight.dequantize()[:128][:, split.gather()[: stop // 4 * 4].long()]


def test_groups_and_norms_are_found(gemma, tokens):
    for model, follows in ((gemma, True), (make("llama"), False)):
        walk = LayerWalk(model, tokens)
        groups = walk.find_groups(0)
        names = [tuple(m.rsplit(".", 1)[-1] for m in g.modules) for g in groups]
        assert names == [
            ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",),
        ]  # fmt: skip
        assert [g.norm_follows for g in groups] == [False, follows, False, follows]


def test_walk_reproduces_the_model(gemma, tokens):
    walk = LayerWalk(gemma, tokens, batch=4)
    for index in range(2):
        walk.forward(index)
    expected = gemma.model(tokens, output_hidden_states=True).hidden_states
    final = gemma.model.norm(torch.cat(walk.hidden))
    torch.testing.assert_close(final, expected[-1], rtol=1e-5, atol=1e-5)


def test_hessians_against_definition(gemma, tokens, gemma_statistics):
    seen = {}

    def hook(name):
        def take(module, args, output):
            seen[name] = (args[0].flatten(0, 1).double(), output.flatten(0, 1).double())

        return take

    handles = []
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        module = gemma.model.layers[1].get_submodule(name)
        handles.append(module.register_forward_hook(hook(name)))
    gemma(tokens)
    for handle in handles:
        handle.remove()
    found = gemma_statistics.layers[1].hessians
    x, _ = seen["self_attn.q_proj"]
    torch.testing.assert_close(found["self_attn.q_proj"].double(), x.T @ x, rtol=1e-4, atol=1e-4)
    x, y = seen["mlp.down_proj"]
    weighted = (x / y.square().mean(dim=1, keepdim=True)).T @ x
    relative = (found["mlp.down_proj"].double() - weighted).norm() / weighted.norm()
    assert relative < 1e-4


def test_gradients_against_autograd(gemma, tokens, gemma_statistics):
    """Layer by layer equals one backward pass through the model."""
    ids = tokens[:2]
    groups = [layer.groups for layer in gemma_statistics.layers]
    found = collect_gradients(gemma, ids, groups, batch=2, labels="text", hessians=True)
    seen, handles = {}, []

    def hook(name):
        def take(module, args, output):
            output.requires_grad_() if not output.requires_grad else None
            output.retain_grad()
            seen[name] = args[0].detach().double(), output

        return take

    for name, module in gemma.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(hook("model.layers." + name)))
    logits = gemma(ids).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    assert set(found.sensitivity) == set(seen) == set(found.sinks) == set(found.hessians)
    for name, (x, y) in seen.items():
        g = y.grad.double().square()
        weight = g.mean(dim=-1)
        limit = CLIP * weight[:, 1:][weight[:, 1:] > 0].median()
        share = (limit / weight[:, 1:]).clamp_max(1.0)
        mean = (weight[:, 1:] * share).mean()
        expected = (g[:, 1:] * share[..., None]).mean(dim=(0, 1))
        close(found.sensitivity[name], expected)
        count = ids.numel()
        sinks = torch.einsum("sk,sl,s->kl", x[:, 0], x[:, 0], weight[:, 0]) / (mean * count)
        close(found.sinks[name].double().T @ found.sinks[name].double(), sinks)
        token = (weight[:, 1:] * share / mean / share.numel()).flatten()
        rows = x[:, 1:].flatten(0, 1)
        close(found.hessians[name], (rows * token[:, None]).T @ rows)
        norm = 1.0
        if name.endswith(("o_proj", "down_proj")):
            norm = float((1.0 / y.detach().double().square().mean(dim=-1)).mean())
        assert found.norm_mean[name] == pytest.approx(norm, rel=1e-4)


def close(found, expected):
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-3


def test_labels_are_drawn_from_the_model(gemma, tokens, gemma_statistics):
    """Gradients of drawn labels differ from draw to draw, and repeat with the seed."""
    groups = [layer.groups for layer in gemma_statistics.layers]
    name = "model.layers.0.mlp.down_proj"
    a, b, c = (
        collect_gradients(gemma, tokens[:2], groups, seed=seed).sensitivity[name]
        for seed in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_fraction_one_is_plain_fp8_bit_for_bit(gemma, tokens, gemma_statistics):
    for strategy in ("uniform", "staircase"):
        keep = pruned_tensors(
            gemma, tokens, quick(dense_fraction=1.0, strategy=strategy), statistics=gemma_statistics
        )
        for index, modules in enumerate(keep.layers):
            for name, pruned in modules.items():
                linear = gemma.model.layers[index].get_submodule(name)
                codes, scale = quantize_weight(linear.weight)
                codes = torch.where(codes == 0x80, 0, codes)
                assert torch.equal(pruned.weight, codes)
                assert torch.equal(pruned.scale, scale)


def test_fraction_zero_is_the_pure_path(gemma, tokens, gemma_statistics):
    """A staircase without dense weights, and widths that round to nothing, equal plain 2:4."""
    pure = pruned_tensors(gemma, tokens, quick(dense_fraction=0.0), statistics=gemma_statistics)
    stairs = quick(dense_fraction=0.0, strategy="staircase")
    tiny = quick(dense_fraction=0.04)  # 0.04 * 160 = 6.4 columns: rounds to 0
    for config in (stairs, tiny):
        assert same(pure, pruned_tensors(gemma, tokens, config, statistics=gemma_statistics))
    for modules in pure.layers:
        for pruned in modules.values():
            assert is_2to4(pruned.dequantized()[:, pruned.split.gather().long()])


def test_statistics_and_streaming_agree(gemma, tokens, gemma_statistics):
    for strategy in ("uniform", "staircase"):
        config = quick(strategy=strategy)
        given = pruned_tensors(gemma, tokens, config, statistics=gemma_statistics)
        assert same(given, pruned_tensors(gemma, tokens, config))


@pytest.mark.parametrize("strategy", ["uniform", "staircase"])
def test_layers_together_and_apart(strategy, gemma, tokens, gemma_statistics):
    """Layers pruned in one batch get the same masks; values may be rounded differently."""
    config = quick(strategy=strategy, fp8=False)
    apart = pruned_tensors(gemma, tokens, config, statistics=gemma_statistics)
    options = {"statistics": gemma_statistics, "layers_at_once": 2}
    together = pruned_tensors(gemma, tokens, config, **options)
    for one, two in zip(apart.layers, together.layers, strict=True):
        for name, pruned in one.items():
            a, b = pruned.weight, two[name].weight
            assert (a - b).norm() <= 1e-3 * a.norm(), name
            assert torch.equal(pruned.k_perm, two[name].k_perm)


def test_statistics_survive_a_file(gemma, tokens, gemma_statistics, tmp_path):
    gemma_statistics.save(tmp_path / "s.pt")
    loaded = prune.Statistics.load(tmp_path / "s.pt")
    assert loaded.layers[0].groups == gemma_statistics.layers[0].groups
    config = quick(strategy="staircase")
    a = pruned_tensors(gemma, tokens, config, statistics=gemma_statistics)
    assert same(a, pruned_tensors(gemma, tokens, config, statistics=loaded))


def test_error_falls_with_the_dense_fraction_and_by_method(gemma, tokens, gemma_statistics):
    def error(**changes):
        config = quick(fp8=False, token_weighting="norm", **changes)
        report = prune_model(
            shallow_clone(gemma), tokens, config, statistics=gemma_statistics, on_layer=Keep()
        )
        return report.mean_relative_error

    by_fraction = [error(dense_fraction=d) for d in (0.0, 0.25, 0.5, 1.0)]
    assert by_fraction == sorted(by_fraction, reverse=True)
    assert by_fraction[-1] == 0.0
    full = error(dense_fraction=0.25)
    wanda = error(dense_fraction=0.25, method="wanda")
    magnitude = error(dense_fraction=0.25, method="magnitude", score="magnitude")
    assert full < 0.7 * wanda < 0.7 * magnitude


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_baselines_only_mask(method, gemma, tokens, gemma_statistics):
    config = quick(method=method, fp8=False, permutation="none", dense_fraction=0.0)
    keep = pruned_tensors(gemma, tokens, config, statistics=gemma_statistics)
    pruned = keep.layers[0]["mlp.gate_proj"]
    weight = gemma.model.layers[0].mlp.gate_proj.weight
    kept = pruned.weight != 0
    assert torch.equal(pruned.weight[kept], weight[kept])
    assert is_2to4(pruned.weight)
    assert kept.float().mean() == 0.5


def test_sorted_rows_leave_the_function_alone(gemma, tokens, gemma_statistics):
    """Gate/up rows and down columns move together: nearly dense, the layer computes the same."""
    config = quick(
        strategy="staircase", dense_fraction=0.999, widths=(0.0, 1.0), fp8=False, refit_steps=0
    )
    target = shallow_clone(gemma)
    prune_model(target, tokens, config, statistics=gemma_statistics)
    old = gemma.model.layers[0].mlp.gate_proj.weight
    new = target.model.layers[0].mlp.gate_proj.weight
    assert not torch.equal(old, new)
    x = torch.randn(5, 48)
    expected = gemma.model.layers[0].mlp(x)
    got = target.model.layers[0].mlp(x)
    # The budget leaves at most one 128-row tile sparse over the model: most layers are exact.
    assert (got - expected).norm() < 0.2 * expected.norm()


def test_k_shards_only_where_rows_are_parallel(gemma, tokens, gemma_statistics):
    config = quick(k_shards=2, dense_fraction=0.5)
    keep = pruned_tensors(gemma, tokens, config, statistics=gemma_statistics)
    shards = {name: p.split.k_shards for name, p in keep.layers[0].items()}
    # o_proj has K = 48, no multiple of 32.
    assert shards["mlp.down_proj"] == 2
    assert set(shards.values()) == {1, 2}
    assert shards["self_attn.o_proj"] == 1
    stairs = quick(k_shards=2, strategy="staircase")
    keep = pruned_tensors(gemma, tokens, stairs, statistics=gemma_statistics)
    down = keep.layers[0]["mlp.down_proj"].split
    assert down.k_shards == 2
    assert down.shard_columns == 80


def test_sequential_calibration_differs_after_the_first_layer(gemma, tokens, gemma_statistics):
    static = pruned_tensors(gemma, tokens, quick(), statistics=gemma_statistics)
    target = shallow_clone(gemma)
    keep = Keep()
    prune_model(target, tokens, quick(calibration="sequential"), on_layer=keep)
    assert torch.equal(static.layers[0]["mlp.up_proj"].weight, keep.layers[0]["mlp.up_proj"].weight)
    a, b = static.layers[1]["mlp.up_proj"].weight, keep.layers[1]["mlp.up_proj"].weight
    assert not torch.equal(a, b)
    config = quick(calibration="sequential")
    with pytest.raises(PruneError, match="sequential"):
        prune_model(target, tokens, config, statistics=gemma_statistics)


@pytest.mark.parametrize("strategy", ["uniform", "staircase"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_lm_head_only_when_asked(family, strategy, tokens):
    """Gemma's head is tied to its embedding, which must stay as it is."""
    model = make(family)
    target = shallow_clone(model)
    config = quick(modules=("lm_head",), strategy=strategy)
    report = prune_model(target, tokens, config)
    assert isinstance(target.lm_head, SpenseLinear)
    assert report.modules[-1].name == "lm_head"
    assert torch.equal(target.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert 0 < report.modules[-1].relative_error < 0.3
    statistics = collect_statistics(model, tokens, config)
    hidden = model.model(tokens).last_hidden_state.flatten(0, 1).double()
    found = statistics.layers[-1].hessians["lm_head"].double()
    torch.testing.assert_close(found, hidden.T @ hidden, rtol=1e-4, atol=1e-4)
    given = pruned_tensors(model, tokens, config, statistics=statistics)
    assert same(given, pruned_tensors(model, tokens, config))
    plain = collect_statistics(model, tokens, quick())
    with pytest.raises(PruneError, match="lack the module"):
        prune_model(model, tokens, quick(modules=("lm_head",)), statistics=plain)


def test_modules_must_be_linears_outside_the_layers(gemma, tokens):
    for name in ("model.embed_tokens", "head", "model.layers.0.mlp.up_proj"):
        with pytest.raises(PruneError, match=r"PruneConfig\.modules"):
            prune_model(gemma, tokens, quick(modules=(name,)), on_layer=Keep())
