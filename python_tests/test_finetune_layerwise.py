# SPDX-License-Identifier: Apache-2.0
"""The fine-tune layer by layer: better layers, the same masks, one layer of a model at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from prune_models import make, quick, tokens_for_calibration

from spense_kernels.errors import PruneError
from spense_kernels.finetune import (
    FinetuneConfig,
    layerwise,
    make_student,
    reconstruct,
    student_layers,
)
from spense_kernels.finetune.layerwise import relative_error
from spense_kernels.finetune.student import kept_places
from spense_kernels.linear import SpenseLinear
from spense_kernels.prune import prune_model, shallow_clone

WINDOWS = torch.randint(0, 211, (5, 24), generator=torch.Generator().manual_seed(3))
CONFIG = FinetuneConfig(steps=12, batch=2, lr=3e-4)


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def models(request):
    teacher = make(request.param)
    pruned = shallow_clone(teacher)
    prune_model(pruned, tokens_for_calibration(), quick(strategy="staircase", widths=(0.0, 0.5)))
    return teacher, pruned


def spense_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, SpenseLinear)}


def hidden_error(model, teacher) -> float:
    with torch.no_grad():
        given, wanted = (
            m(WINDOWS, output_hidden_states=True).hidden_states[-1] for m in (model, teacher)
        )
    return float(relative_error(given, wanted))


def test_every_layer_comes_nearer_and_masks_stay(models, monkeypatch):
    teacher, pruned = models
    tuned = copy.deepcopy(pruned)
    students = []

    def counting(layer):
        make_student(layer)
        students.append((len(student_layers(layer)), len(student_layers(tuned))))

    monkeypatch.setattr(layerwise, "make_student", counting)
    report = reconstruct(tuned, teacher, WINDOWS, CONFIG)
    assert students == [(7, 7), (7, 7)]  # one layer at a time is trainable
    assert student_layers(tuned) == {}
    assert len(report.losses) == 2
    assert all(after < 0.9 * before for before, after in report.losses), report.losses
    assert hidden_error(tuned, teacher) < 0.9 * hidden_error(pruned, teacher)
    old, new = spense_layers(pruned), spense_layers(tuned)
    assert set(old) == set(new)
    for name, layer in new.items():
        places = [
            kept_places(m.hybrid_weight().dequantize(), m.hybrid_weight().split)
            for m in (old[name], layer)
        ]
        assert not (places[1] & ~places[0]).any(), name
        assert not torch.equal(layer.w_packed, old[name].w_packed), name


def test_a_layer_that_gets_worse_stays_as_it_was(models):
    teacher, pruned = models
    tuned = copy.deepcopy(pruned)
    wild = FinetuneConfig(steps=2, batch=2, lr=30.0, warmup=0)
    report = reconstruct(tuned, teacher, WINDOWS, wild)
    assert all(before == after for before, after in report.losses)
    for name, layer in spense_layers(tuned).items():
        assert torch.equal(layer.w_packed, spense_layers(pruned)[name].w_packed), name
        assert torch.equal(layer.w_scale, spense_layers(pruned)[name].w_scale), name


def test_the_same_seed_gives_the_same_bits(models):
    teacher, pruned = models
    found = []
    for seed in (0, 0, 1):
        tuned = copy.deepcopy(pruned)
        settings = FinetuneConfig(steps=8, batch=2, lr=3e-4, seed=seed)
        reconstruct(tuned, teacher, WINDOWS, settings)
        found.append(next(iter(spense_layers(tuned).values())).w_packed)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("name", "value"),
    [("minutes", 1.0), ("micro_batch", 1), ("splice", 2), ("noise", 0.1), ("interpolation", 0.5)],
)
def test_settings_of_whole_models_are_refused(models, name, value):
    teacher, pruned = models
    with pytest.raises(PruneError, match=rf"layer by layer: {name}: expected .*, got {value}"):
        reconstruct(pruned, teacher, WINDOWS, FinetuneConfig(**{name: value}))


def test_nothing_to_train_is_said(models):
    teacher, _ = models
    with pytest.raises(PruneError, match="holds no SpenseLinear"):
        reconstruct(copy.deepcopy(teacher), teacher, WINDOWS)


def test_the_error_is_by_token():
    wanted = torch.tensor([[[1000.0, 0.0], [0.0, 1.0]]])
    given = torch.tensor([[[1000.0, 10.0], [0.0, 0.0]]])
    assert float(relative_error(given, wanted)) == pytest.approx((1e-4 + 1.0) / 2)
