# SPDX-License-Identifier: Apache-2.0
"""prune_model on tiny models of four families: end to end, baselines, faults, resuming."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from spense_kernels import prune
from spense_kernels.errors import PruneError
from spense_kernels.linear import SpenseLinear
from spense_kernels.prune import PruneConfig, collect_statistics, prune_model, shallow_clone
from spense_kernels.prune.calibrate import LayerWalk
from spense_kernels.prune.groups import decoder_layers
from spense_kernels.prune.install import PrunedModule
from spense_kernels.prune.mask import is_2to4
from spense_kernels.prune.sensitivity import output_sensitivity
from spense_kernels.quant import quantize_weight

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 16}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 12}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 12, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
QUICK = {"search_rounds": 3, "search_rows": 64, "refit_steps": 4, "sensitivity_sequences": 2}


def quick(**changes) -> PruneConfig:
    return PruneConfig(**{**QUICK, **changes})


def make(family: str, **changes):
    config, model, extra = FAMILIES[family]
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**{**COMMON, **extra, **changes})
    return getattr(transformers, model)(settings).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 211, (6, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def gemma():
    return make("gemma3")


@pytest.fixture(scope="module")
def gemma_statistics(gemma, tokens):
    return collect_statistics(gemma, tokens, quick(strategy="staircase"))


class Keep:
    """on_layer that only collects what would be installed."""

    def __init__(self):
        self.layers: list[dict[str, PrunedModule]] = []

    def __call__(self, layer, modules):
        self.layers.append(modules)

    def tensors(self):
        for modules in self.layers:
            for name, pruned in sorted(modules.items()):
                for field, value in vars(pruned).items():
                    yield name, field, value


def pruned_tensors(model, tokens, config, **options):
    keep = Keep()
    prune_model(model, tokens, config, on_layer=keep, **options)
    return keep


def same(a: Keep, b: Keep) -> bool:
    pairs = zip(a.tensors(), b.tensors(), strict=True)
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for (*_, x), (*_, y) in pairs
    )


def distance(model, other, tokens) -> float:
    return float((model(tokens).logits - other(tokens).logits).square().mean())


@pytest.mark.parametrize("strategy", ["uniform", "staircase"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_end_to_end(family, strategy, tokens):
    model = make(family)
    target = shallow_clone(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = prune_model(target, tokens, quick(strategy=strategy))
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


def test_sensitivity_against_autograd(gemma, tokens, gemma_statistics):
    """Layer by layer equals one backward pass through the model."""
    ids = tokens[:2]
    groups = [layer.groups for layer in gemma_statistics.layers]
    found = output_sensitivity(gemma, ids, groups, weighting="norm")
    plain = output_sensitivity(gemma, ids, groups, weighting="none")
    outputs, handles = {}, []

    def hook(name):
        def take(module, args, output):
            output.requires_grad_() if not output.requires_grad else None
            output.retain_grad()
            outputs[name] = output

        return take

    for name, module in gemma.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(hook("model.layers." + name)))
    logits = gemma(ids).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    assert set(found) == set(outputs)
    for name, y in outputs.items():
        g = y.grad.flatten(0, 1).double()
        expected = g.square().mean(dim=0)
        torch.testing.assert_close(plain[name].double(), expected, rtol=1e-3, atol=1e-12)
        if name.endswith(("o_proj", "down_proj")):
            energy = y.detach().flatten(0, 1).double().square().mean(dim=1, keepdim=True)
            expected = (g.square() * energy).mean(dim=0)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-12)


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


class Killed(Exception):
    pass


@pytest.mark.parametrize(("strategy", "calibration"), [
    ("uniform", "static"), ("staircase", "static"), ("uniform", "sequential"),
])  # fmt: skip
def test_resume_after_a_kill_is_bitwise_the_same(strategy, calibration, gemma, tokens, tmp_path,
                                                 monkeypatch):  # fmt: skip
    config = quick(strategy=strategy, calibration=calibration)
    whole = Keep()
    prune_model(shallow_clone(gemma), tokens, config, on_layer=whole)
    from spense_kernels.prune import driver

    done = []
    real = driver.compress

    def dying(problem, *rest):
        if problem.name.startswith("model.layers.1.mlp"):
            raise Killed
        done.append(problem.name)
        return real(problem, *rest)

    monkeypatch.setattr(driver, "compress", dying)
    with pytest.raises(Killed):
        prune_model(shallow_clone(gemma), tokens, config, work_dir=tmp_path, on_layer=Keep())
    assert (tmp_path / "layer_0000.pt").exists()
    assert not (tmp_path / "layer_0001.pt").exists()

    def counting(problem, *rest):
        done.append(problem.name)
        return real(problem, *rest)

    monkeypatch.setattr(driver, "compress", counting)
    done.clear()
    resumed = Keep()
    target = shallow_clone(gemma)
    report = prune_model(target, tokens, config, work_dir=tmp_path, on_layer=resumed)
    assert all(name.startswith("model.layers.1.") for name in done)
    assert done
    assert same(whole, resumed)
    assert any("work_dir" in note for note in report.notes)


def test_work_dir_of_another_run_is_refused(gemma, tokens, tmp_path):
    prune_model(shallow_clone(gemma), tokens, quick(), work_dir=tmp_path, on_layer=Keep())
    with pytest.raises(PruneError, match="work_dir"):
        prune_model(shallow_clone(gemma), tokens, quick(seed=1), work_dir=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(PruneError, match="empty"):
        prune_model(shallow_clone(gemma), tokens, quick(), work_dir=tmp_path / "other")


def test_damaged_layer_file_is_done_again(gemma, tokens, tmp_path):
    whole = pruned_tensors(shallow_clone(gemma), tokens, quick(), work_dir=tmp_path)
    data = (tmp_path / "layer_0001.pt").read_bytes()
    (tmp_path / "layer_0001.pt").write_bytes(data[: len(data) // 2])
    assert same(whole, pruned_tensors(shallow_clone(gemma), tokens, quick(), work_dir=tmp_path))


def test_nan_weight_names_the_projection(tokens):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(PruneError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has NaN"):
        prune_model(model, tokens, quick())
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)  # nothing was replaced


def test_inf_activation_names_the_projection(tokens):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[7] = float("inf")
    with pytest.raises(PruneError, match=r"model\.layers\.1\.mlp\.gate_proj has NaN or Inf"):
        collect_statistics(model, tokens, quick())


def test_dead_channel_is_pruned_and_noted(tokens):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 0.0
    keep = Keep()
    report = prune_model(model, tokens, quick(), on_layer=keep)
    assert any("q_proj: 1 dead inputs" in note for note in report.notes)
    assert not keep.layers[0]["self_attn.q_proj"].dequantized()[:, 5].any()


def test_one_token_calibration_is_singular_but_works():
    model = make("qwen3")
    report = prune_model(model, torch.tensor([[1, 2]]), quick())
    assert all(m.relative_error >= 0 for m in report.modules)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_biases_are_kept(tokens):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.copy_(torch.randn(48))
    expected = model.model.layers[0].self_attn.q_proj.bias.clone()
    prune_model(model, tokens, quick())
    assert torch.equal(model.model.layers[0].self_attn.q_proj.hybrid_weight().bias, expected)


def test_skip_leaves_projections_alone(gemma, tokens):
    target = shallow_clone(gemma)
    report = prune_model(target, tokens, quick(skip=("mlp.down_proj", "layers.0.self_attn")))
    assert isinstance(target.model.layers[0].mlp.down_proj, nn.Linear)
    assert isinstance(target.model.layers[0].self_attn.q_proj, nn.Linear)
    assert isinstance(target.model.layers[1].self_attn.q_proj, SpenseLinear)
    assert not any("down_proj" in m.name for m in report.modules)


@pytest.mark.parametrize(("calibration", "text"), [
    (torch.zeros(2, 8), "int64"), (torch.zeros(8, dtype=torch.int64), "int64"),
    (torch.zeros(0, 8, dtype=torch.int64), "int64"), (torch.full((1, 8), 999), "999"),
    ([[1, 2]], "int64"), (torch.full((1, 8), -1), "-1"),
])  # fmt: skip
def test_bad_calibration(calibration, text, gemma):
    with pytest.raises(PruneError, match=text):
        collect_statistics(gemma, calibration)


@pytest.mark.parametrize("changes", [
    {"dense_fraction": 1.5}, {"method": "obd"}, {"refit_steps": -1}, {"k_shards": 0},
    {"widths": ()}, {"widths": (0.0, 2.0)}, {"damping": 0.0}, {"seed": 1.5},
    {"strategy": "staircase", "method": "wanda"}, {"dense_fraction": float("nan")},
])  # fmt: skip
def test_bad_settings(changes):
    with pytest.raises(PruneError, match="PruneConfig"):
        PruneConfig(**changes)


def test_mismatched_statistics_are_refused(gemma, tokens, gemma_statistics):
    config = quick(token_weighting="none")
    with pytest.raises(PruneError, match="token_weighting"):
        prune_model(gemma, tokens, config, statistics=gemma_statistics)
    with pytest.raises(PruneError, match="another calibration"):
        prune_model(gemma, tokens[:2], quick(), statistics=gemma_statistics)
    plain = collect_statistics(gemma, tokens, quick())
    with pytest.raises(PruneError, match="sensitivity"):
        prune_model(gemma, tokens, quick(strategy="staircase"), statistics=plain)


def test_a_pruned_model_is_refused(tokens):
    model = make("llama")
    prune_model(model, tokens, quick())
    with pytest.raises(PruneError, match="pruned already"):
        decoder_layers(model)


def test_progress_sees_every_layer(gemma, tokens):
    events = []

    class Progress:
        def start(self, stage, total):
            events.append([stage, total, 0])

        def advance(self, count=1):
            events[-1][2] += count

        def finish(self):
            pass

    statistics = collect_statistics(gemma, tokens, quick(strategy="staircase"), progress=Progress())
    prune_model(
        gemma, tokens, quick(strategy="staircase"), statistics=statistics, progress=Progress(),
        on_layer=Keep(),
    )  # fmt: skip
    assert events == [
        [stage, 2, 2] for stage in ("calibrate", "sensitivity", "row losses", "prune")
    ]
