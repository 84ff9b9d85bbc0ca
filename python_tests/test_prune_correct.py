# SPDX-License-Identifier: Apache-2.0
"""`correct`: layers pruned on the inputs of what is pruned in front, aimed at the dense outputs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")

from prune_models import Keep, distance, make, pruned_tensors, quick, same

from spense_kernels.cli.settings import make_config
from spense_kernels.errors import PruneError
from spense_kernels.linear import SpenseLinear
from spense_kernels.prune import collect_statistics, prune_model, shallow_clone
from spense_kernels.prune.calibrate import LayerWalk
from spense_kernels.prune.correct import Corrector
from spense_kernels.prune.install import install
from spense_kernels.prune.mask import is_2to4
from spense_kernels.prune.plan import Curvature, uniform_plan
from spense_kernels.prune.stand_in import Fp8Linear
from spense_kernels.prune.tasks import layer_tasks

STAIRCASE = {"strategy": "staircase", "dense_fraction": 0.25, "sensitivity_stride": 1}


def layer_error(model, pruned, tokens) -> list[float]:
    """Squared distance of every layer's outputs from the dense model's, relative."""
    dense = model.model(tokens, output_hidden_states=True).hidden_states[1:]
    other = pruned.model(tokens, output_hidden_states=True).hidden_states[1:]
    pairs = zip(dense, other, strict=True)
    return [float((a - b).square().sum() / a.square().sum()) for a, b in pairs]


@pytest.mark.parametrize("family", ["gemma3", "llama"])
@pytest.mark.parametrize("changes", [{}, {"fp8": False}, STAIRCASE], ids=str)
def test_outputs_come_closer_to_the_dense_model(family, changes, tokens):
    more = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    model = make(family, num_hidden_layers=3, **(more if family == "gemma3" else {}))
    errors = []
    for correct in (False, True):
        target = shallow_clone(model)
        report = prune_model(target, tokens, quick(correct=correct, refit_steps=12, **changes))
        errors.append(layer_error(model, target, tokens))
        assert all(0 < m.relative_error < 0.3 for m in report.modules)
    plain, corrected = errors
    assert sum(corrected) < 0.97 * sum(plain), errors


@pytest.mark.parametrize("strategy", ["uniform", "staircase"])
def test_order_and_widths_stay_and_masks_are_legal(gemma, tokens, strategy):
    config = quick(strategy=strategy)
    plain = pruned_tensors(gemma, tokens, config)
    corrected = pruned_tensors(gemma, tokens, config.replace(correct=True))
    moved = 0
    for before, after in zip(plain.layers, corrected.layers, strict=True):
        assert list(before) == list(after)
        for name, module in after.items():
            assert torch.equal(module.k_perm, before[name].k_perm)
            assert torch.equal(module.dense_width, before[name].dense_width)
            moved += not torch.equal(module.weight, before[name].weight)
            order = module.split.columns()[0].long()
            for tile, width in enumerate(module.dense_width.tolist()):
                rows = module.dequantized()[128 * tile : 128 * (tile + 1)]
                stop = (module.split.k - width) // 4 * 4
                assert is_2to4(rows[:, order[:stop]])
    assert moved == 14  # FP8 activations alone move even the first layer's


def test_same_bits_again_with_and_without_statistics(gemma, tokens):
    config = quick(correct=True, **STAIRCASE)
    statistics = collect_statistics(gemma, tokens, config)
    keep = pruned_tensors(gemma, tokens, config)
    assert same(keep, pruned_tensors(gemma, tokens, config))
    given = pruned_tensors(gemma, tokens, config, statistics=statistics)
    assert same(keep, given)
    together = pruned_tensors(gemma, tokens, config, statistics=statistics, layers_at_once=2)
    for (*_, field, a), (*_, b) in zip(keep.tensors(), together.tensors(), strict=True):
        if field in ("k_perm", "dense_width"):
            assert torch.equal(a, b)


@pytest.mark.parametrize("changes", [{}, STAIRCASE, {"fp8": False}], ids=str)
def test_resume_gives_the_same_bits(gemma, tokens, tmp_path, changes):
    config = quick(correct=True, **changes)
    whole = pruned_tensors(gemma, tokens, config)

    class Killed(Exception):
        pass

    def kill(layer, modules):
        raise Killed

    with pytest.raises(Killed):
        prune_model(shallow_clone(gemma), tokens, config, work_dir=tmp_path, on_layer=kill)
    assert [path.name for path in tmp_path.glob("layer_*.pt")] == ["layer_0000.pt"]
    resumed = Keep()
    report = prune_model(gemma, tokens, config, work_dir=tmp_path, on_layer=resumed)
    assert any("layers.0.: taken from work_dir" in note for note in report.notes)
    assert same(whole, resumed)


def problems(model, tokens, config, index, pruned_in_front=None, batch=4):
    """Tasks of a layer, and what the corrector makes of them before anything is pruned."""
    statistics = collect_statistics(model, tokens, config)
    layer, walk = model.model.layers[index], statistics.layers[index]
    curvature = Curvature(statistics.gradients, tokens.numel(), config)
    plan = uniform_plan(layer, walk.groups, config)
    prefix = f"model.layers.{index}."
    tasks = layer_tasks(
        index, layer, walk.groups, walk.hessians, plan, curvature, prefix, "cpu"
    )  # fmt: skip
    corrector = Corrector(model, tokens, config, statistics.gradients, "cpu", batch)
    for i in range(index):
        corrector.advance(i, {} if pruned_in_front is None else pruned_in_front.layers[i])
    return tasks, corrector


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("index", [0, 1])
def test_nothing_lost_in_front_changes_no_target(gemma, tokens, index, share, sinks):
    """Then the target is W, and H is that of a prune without `correct`."""
    config = quick(correct=True, fp8=False, gradient_share=share, sinks=sinks)
    config = config.replace(sensitivity_sequences=6, sensitivity_stride=1)
    tasks, corrector = problems(gemma, tokens, config, index)
    seen = corrector._see(index, tasks)
    for task in tasks:
        inputs = corrector._inputs(index, task)
        made = corrector._problem(index, task, seen[task.group.name], inputs)
        for weight, target in zip(task.problem.weights, made.weights, strict=True):
            torch.testing.assert_close(target, weight, rtol=1e-5, atol=1e-6)
        for (_, mine), (_, theirs) in zip(made.parts, task.problem.parts, strict=True):
            if not (share or sinks):  # a plain sum over the tokens
                theirs = theirs / theirs.trace() * mine.trace()
            # First tokens weigh alike here, each by itself there; their sum is the same.
            torch.testing.assert_close(mine.trace(), theirs.trace(), rtol=1e-4, atol=0)
            assert sinks or float((mine - theirs).norm() / theirs.norm()) < 1e-4


def test_target_against_its_definition(gemma, tokens):
    """Of all matrices W' loses least on the pruned model's inputs, up to the damping."""
    config = quick(correct=True, fp8=False, sinks=False, damping=1e-6, dense_fraction=0.0)
    front = pruned_tensors(gemma, tokens, config.replace(correct=False))
    tasks, corrector = problems(gemma, tokens, config, 1, front)
    dense, pruned = shallow_clone(gemma), shallow_clone(gemma)
    walks = LayerWalk(dense, tokens, batch=6), LayerWalk(pruned, tokens, batch=6)
    install(pruned.model.layers[0], front.layers[0])
    for walk in walks:
        walk.forward(0)
    seen = corrector._see(1, tasks)
    task = tasks[0]
    made = corrector._problem(1, task, seen[task.group.name], corrector._inputs(1, task))
    norms = [m.model.layers[1].input_layernorm for m in (dense, pruned)]
    x_d, x_p = (n(w.hidden[0]).flatten(0, 1).double() for n, w in zip(norms, walks, strict=True))
    weight = task.problem.weights[0].double()
    best = torch.linalg.lstsq(x_p, x_d @ weight.T).solution.T
    matrices = (weight, made.weights[0].double(), best)
    loss = [float((x_p @ w.T - x_d @ weight.T).square().sum()) for w in matrices]
    assert loss[2] <= loss[1] <= loss[2] + 0.01 * (loss[0] - loss[2]), loss
    assert loss[2] < 0.8 * loss[0]


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_one_pass_gives_the_bits_of_going_from_group_to_group(family, tokens, fp8):
    """Modules, what the next layer reads, and no hook that stays."""
    model, found = make(family), []
    config = quick(correct=True, fp8=fp8, gradient_share=0.5, sensitivity_stride=1)
    config = config.replace(sensitivity_sequences=len(tokens))
    for way in ("_in_one_pass", "_by_group"):
        tasks, corrector = problems(model, tokens, config, 0, batch=len(tokens))
        seen = corrector._see(0, tasks)
        modules = getattr(corrector, way)(0, tasks, seen)
        assert not seen
        layer = corrector.pruned.layers[0]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
        found.append((modules, corrector.pruned.hidden[0]))
    (one, out), (other, expected) = found
    assert torch.equal(out, expected)
    assert list(one) == list(other)
    for name, module in one.items():
        assert torch.equal(module.weight, other[name].weight), name
        assert torch.equal(module.k_perm, other[name].k_perm), name
        assert module.error == other[name].error


def test_all_tokens_in_a_batch_take_one_pass(gemma, tokens, monkeypatch):
    config = quick(correct=True)
    monkeypatch.setattr(Corrector, "_by_group", None)
    together = pruned_tensors(gemma, tokens, config, batch=len(tokens))
    monkeypatch.undo()
    monkeypatch.setattr(Corrector, "_in_one_pass", None)
    apart = pruned_tensors(gemma, tokens, config, batch=2)
    errors = [
        (name, a, b)
        for (name, field, a), (*_, b) in zip(together.tensors(), apart.tensors(), strict=True)
        if field == "error"
    ]
    # Sums in another order let single groups keep other weights: on some CPUs in a layer's last
    # projection already, whose input the others make; later layers take that further.
    for i, (name, a, b) in enumerate(errors):
        first_layer = i < len(together.layers[0])
        bound = 0.04 if not first_layer else 0.01 if name == "mlp.down_proj" else 0.0005
        assert a == pytest.approx(b, rel=bound), name
    of_all = (sum(e[i] for e in errors) for i in (1, 2))
    assert next(of_all) == pytest.approx(next(of_all), rel=0.01)


@pytest.mark.gpu
def test_on_cuda_one_pass_loses_what_batches_do(tokens):
    """By default all tokens are in one pass there, and small Hessians stay."""
    model = make("gemma3").to(torch.bfloat16).cuda()
    config = quick(correct=True, gradient_share=1.0, **STAIRCASE)
    config = config.replace(sensitivity_sequences=len(tokens))
    found = []
    for batch in (None, 2):
        statistics = collect_statistics(model, tokens, config, device="cuda", batch=batch)
        kept = [h for layer in statistics.layers for h in layer.hessians.values()]
        assert all(h.is_cuda for h in [*kept, *statistics.gradients.hessians.values()])
        keep = pruned_tensors(
            model, tokens, config, statistics=statistics, device="cuda", batch=batch
        )
        found.append([m.error for modules in keep.layers for m in modules.values()])
    assert sum(found[0]) == pytest.approx(sum(found[1]), rel=0.05)


def test_energies_take_their_own_sequences(gemma, tokens):
    config = quick(correct=True, gradient_share=0.5, sensitivity_sequences=2, sensitivity_stride=1)
    statistics = collect_statistics(gemma, tokens, config)
    corrector = Corrector(gemma, tokens, config, statistics.gradients, "cpu", 4)
    assert corrector.shape == (2, 32)
    bare = dataclasses.replace(statistics.gradients, energy={})
    assert Corrector(gemma, tokens, config, bare, "cpu", 4).shape == (6, 32)
    target = shallow_clone(gemma)
    prune_model(target, tokens, config, statistics=statistics)
    assert distance(gemma, target, tokens) < 0.5 * float(gemma(tokens).logits.var())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stand_in_computes_what_is_installed(gemma, tokens, dtype):
    modules = pruned_tensors(make("llama"), tokens, quick()).layers[0]
    model = make("llama").to(dtype)
    layer = model.model.layers[0]
    install(layer, modules)
    for name, pruned in modules.items():
        spense = layer.get_submodule(name)
        assert isinstance(spense, SpenseLinear)
        x = torch.randn(3, 5, spense.in_features, generator=torch.Generator().manual_seed(2))
        x, near = x.to(dtype), 2 * torch.finfo(dtype).eps
        y, expected = Fp8Linear(pruned, dtype, "cpu")(x), spense(x)
        assert (y.dtype, y.shape) == (dtype, expected.shape)
        error = (y.float() - expected.float()).abs()
        assert bool((error <= near * expected.float().abs() + 1e-5).all())


def test_setting(gemma, tokens):
    assert make_config({}, ["correct=true"]).correct is True
    for wrong in ({"method": "wanda"}, {"calibration": "sequential"}):
        with pytest.raises(PruneError, match="correct needs"):
            quick(correct=True, **wrong)
    with pytest.raises(PruneError, match="correct must be"):
        quick(correct=1)
    dense = quick(dense_fraction=1.0)
    assert same(
        pruned_tensors(gemma, tokens, dense),
        pruned_tensors(gemma, tokens, dense.replace(correct=True)),
    )


def test_head_outside_the_layers_is_pruned_as_before(tokens):
    model = make("llama")
    config = quick(modules=("lm_head",))
    plain = pruned_tensors(model, tokens, config).layers[-1]["lm_head"]
    corrected = pruned_tensors(model, tokens, config.replace(correct=True)).layers[-1]["lm_head"]
    assert torch.equal(plain.weight, corrected.weight)
