# SPDX-License-Identifier: Apache-2.0
"""The result between the pruned and the tuned weights."""

from __future__ import annotations

import copy

import pytest
import torch
from prune_models import make, quick, student_of, tokens_for_calibration
from torch import nn

from spense_kernels.errors import PruneError
from spense_kernels.finetune import (
    FinetuneConfig,
    finetune,
    finish_student,
    make_student,
    student_layers,
)
from spense_kernels.prune import prune_model

WINDOWS = torch.randint(0, 211, (5, 24), generator=torch.Generator().manual_seed(3))
SETTINGS = {"steps": 6, "batch": 2, "lr": 1e-3, "save_every": 2}


def weights_of(student) -> dict[str, torch.Tensor]:
    return {name: m.weight.detach().clone() for name, m in student_layers(student).items()}


class Stop:
    """Stands for a progress display; ends the run after some steps, as a kill does."""

    def __init__(self, after: int):
        self.left = after

    def start(self, stage, total):
        pass

    def advance(self, count=1):
        self.left -= count
        if not self.left:
            raise InterruptedError

    def finish(self):
        pass


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_the_result_lies_between_start_and_end(family):
    """And the steps are those of a run without."""
    student, plain = student_of(family), student_of(family)
    start = weights_of(student)
    between = finetune(
        student, make(family), WINDOWS, FinetuneConfig(**SETTINGS, interpolation=0.6)
    )
    straight = finetune(plain, make(family), WINDOWS, FinetuneConfig(**SETTINGS))
    assert between.losses == straight.losses
    end = weights_of(plain)
    for name, layer in student_layers(student).items():
        assert not torch.equal(end[name], start[name])
        torch.testing.assert_close(layer.weight.detach(), 0.4 * start[name] + 0.6 * end[name])
        assert not bool(layer.weight[~layer.mask].any())


@pytest.mark.parametrize("stop", [3, 5])
def test_a_resume_gives_the_same_bits(stop, tmp_path):
    """Also one of a run that had ended: it does not go back once more."""
    config = FinetuneConfig(**SETTINGS, interpolation=0.6)
    teacher, straight = make("gemma3"), student_of("gemma3")
    finetune(straight, teacher, WINDOWS, config)
    with pytest.raises(InterruptedError):
        finetune(
            student_of("gemma3"), teacher, WINDOWS, config, work_dir=tmp_path, progress=Stop(stop)
        )
    for first in (stop - 1, 6):
        resumed = student_of("gemma3")
        report = finetune(resumed, teacher, WINDOWS, config, work_dir=tmp_path)
        assert report.first_step == first
        for name, weight in weights_of(straight).items():
            assert torch.equal(weight, student_layers(resumed)[name].weight), name


def test_fp8_comes_after_it():
    """The layers that come out hold codes of the weights between, within half a step of them."""
    model = make("gemma3")
    prune_model(model, tokens_for_calibration(), quick(strategy="staircase"))
    student = make_student(model)
    finetune(student, make("gemma3"), WINDOWS, FinetuneConfig(**SETTINGS, interpolation=0.6))
    between = weights_of(student)
    masks = {name: m.mask.clone() for name, m in student_layers(student).items()}
    finished = finish_student(student)
    for name, weight in between.items():
        hybrid = finished.get_submodule(name).hybrid_weight()
        found = hybrid.dequantize()
        bound = weight.abs() / 16 + hybrid.w_scale[:, None] * 2.0**-10
        assert bool(((found - weight).abs() <= bound * 1.0001).all())
        assert not bool(found[~masks[name]].any())


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_out_of_range(share):
    with pytest.raises(PruneError, match="interpolation must be in"):
        FinetuneConfig(interpolation=share)


@pytest.mark.gpu
def test_fast_steps_end_between_too():
    """On CUDA, compiled and replayed as a graph: a run with and one without differ as they must."""
    start, teacher = student_of("gemma3").to(torch.bfloat16), make("gemma3")
    for layer in student_layers(start).values():
        layer.weight = nn.Parameter(layer.weight.float())
    teacher, ends = teacher.to(torch.bfloat16).cuda(), {}
    for share in (1.0, 0.6):
        tuned = copy.deepcopy(start)
        finetune(tuned, teacher, WINDOWS, FinetuneConfig(**SETTINGS, interpolation=share))
        ends[share] = weights_of(tuned)
    for name, first in weights_of(start).items():
        way, whole = (ends[share][name].cpu() - first for share in (0.6, 1.0))
        assert float((way - 0.6 * whole).norm()) < 0.1 * float(whole.norm())
