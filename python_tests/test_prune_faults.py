# SPDX-License-Identifier: Apache-2.0
"""prune_model when things go wrong: kills, damaged files, NaN, dead inputs, wrong arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from prune_models import Keep, make, pruned_tensors, quick, same

from spense_kernels.errors import PruneError
from spense_kernels.linear import SpenseLinear
from spense_kernels.prune import (
    PruneConfig,
    collect_statistics,
    driver,
    prune_model,
    refit,
    shallow_clone,
)
from spense_kernels.prune.groups import decoder_layers


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
    done = []
    real = driver.compress

    def dying(problems, *rest):
        if problems[0].name.startswith("model.layers.1.mlp"):
            raise Killed
        return real(problems, *rest)

    monkeypatch.setattr(driver, "compress", dying)
    with pytest.raises(Killed):
        prune_model(shallow_clone(gemma), tokens, config, work_dir=tmp_path, on_layer=Keep())
    assert (tmp_path / "layer_0000.pt").exists()
    assert not (tmp_path / "layer_0001.pt").exists()

    def counting(problems, *rest):
        done.extend(problem.name for problem in problems)
        return real(problems, *rest)

    monkeypatch.setattr(driver, "compress", counting)
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


def test_raised_damping_of_the_refit_is_noted(gemma, tokens, tmp_path, monkeypatch):
    """And stays noted when finished layers are taken from the work_dir."""
    real = refit.schur_complement
    calls = []

    def first_fails(hessian, start):
        calls.append(start)
        reduced, back, sound = real(hessian, start)
        return reduced, back, sound & (len(calls) > 1)

    monkeypatch.setattr(refit, "schur_complement", first_fails)
    settings = quick(admm_steps=1, refit_steps=1)
    for _ in range(2):
        model = shallow_clone(gemma)
        report = prune_model(model, tokens, settings, work_dir=tmp_path)
        raised = [m.name for m in report.modules if m.refit_damping > 2e-4]
        assert raised
        assert all(m.refit_damping == pytest.approx(1e-3) for m in report.modules
                   if m.name in raised)  # fmt: skip
        noted = [note for note in report.notes if "damping of the refit raised to 0.001" in note]
        assert [note.split(":")[0] for note in noted] == raised


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
    {"widths": ("half",)}, {"curves": "some"}, {"widths": (0.0, 2.0)}, {"damping": 0.0},
    {"strategy": "staircase", "method": "wanda"}, {"dense_fraction": float("nan")}, {"seed": 1.5},
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
    plain = collect_statistics(gemma, tokens, quick(sinks=False))
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
