# SPDX-License-Identifier: Apache-2.0
"""The mean of the weights over the last steps, and layers' outputs as a second target."""

from __future__ import annotations

import copy

import pytest
import torch
from prune_models import make, student_of

from spense_kernels.errors import PruneError
from spense_kernels.finetune import FinetuneConfig, finetune, student_layers
from spense_kernels.finetune.features import LayerOutputs
from spense_kernels.finetune.teacher import last_hidden

WINDOWS = torch.randint(0, 211, (5, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def family(request):
    return request.param


class Watch:
    """Stands for a progress display; keeps the weights after each step, stops after some."""

    def __init__(self, student, stop=None):
        self.layers, self.stop, self.seen = student_layers(student), stop, []

    def start(self, stage, total):
        pass

    def advance(self, count=1):
        if count:
            self.seen.append({n: m.weight.detach().clone() for n, m in self.layers.items()})
        if self.stop is not None and len(self.seen) == self.stop:
            raise InterruptedError

    def finish(self):
        pass


def test_the_result_is_the_mean_over_the_last_steps(family):
    config = FinetuneConfig(steps=8, batch=2, lr=1e-3, average=0.5)
    student, plain = student_of(family), student_of(family)
    watch = Watch(student)
    finetune(student, make(family), WINDOWS, config, progress=watch)
    finetune(plain, make(family), WINDOWS, FinetuneConfig(steps=8, batch=2, lr=1e-3))
    others = student_layers(plain)
    for name, layer in student_layers(student).items():
        states = torch.stack([seen[name] for seen in watch.seen])
        assert torch.equal(states[-1], others[name].weight)
        torch.testing.assert_close(layer.weight, states[4:].mean(dim=0))
        assert not bool(layer.weight[~layer.mask].any())


@pytest.mark.parametrize("stop", [3, 7])
def test_a_resume_gives_the_same_mean(stop, tmp_path):
    """Stopped before the first step of the mean, and among them."""
    config = FinetuneConfig(steps=8, batch=2, save_every=2, lr=1e-3, average=0.5)
    teacher, straight, resumed = make("gemma3"), student_of("gemma3"), student_of("gemma3")
    finetune(straight, teacher, WINDOWS, config)
    stopped = student_of("gemma3")
    with pytest.raises(InterruptedError):
        finetune(
            stopped, teacher, WINDOWS, config, work_dir=tmp_path, progress=Watch(stopped, stop)
        )
    report = finetune(resumed, teacher, WINDOWS, config, work_dir=tmp_path)
    assert report.first_step == stop - 1
    done = student_of("gemma3")
    report = finetune(done, teacher, WINDOWS, config, work_dir=tmp_path)
    assert report.first_step == 8
    for name, layer in student_layers(straight).items():
        assert torch.equal(layer.weight, student_layers(resumed)[name].weight), name
        assert torch.equal(layer.weight, student_layers(done)[name].weight), name


def test_a_run_cut_before_its_mean_keeps_the_last_weights():
    student = student_of("gemma3")
    watch = Watch(student)
    config = FinetuneConfig(steps=50, batch=2, average=0.1)
    finetune(student, make("gemma3"), WINDOWS, config, progress=watch, max_seconds=0.0)
    assert len(watch.seen) == 1
    for name, layer in student_layers(student).items():
        assert torch.equal(layer.weight, watch.seen[0][name])


def outputs_of(model, ids) -> list[torch.Tensor]:
    """Of the decoder layers. The last entry of hidden_states is behind the last norm."""
    found = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: found.append(output))
        for layer in model.model.layers
    ]
    model.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def test_distance_of_layers_outputs(family):
    student, teacher, outputs = student_of(family), make(family), LayerOutputs()
    pairs = list(zip(outputs_of(student, WINDOWS), outputs_of(teacher, WINDOWS), strict=True))
    expected = [
        float((a - b)[s, t].double().square().sum() / b[s, t].double().square().sum())
        for a, b in pairs
        for s in range(5)
        for t in range(1, 24)
    ]
    with outputs.watched(student, teacher):
        for _ in range(2):
            last_hidden(teacher, WINDOWS)
            last_hidden(student, WINDOWS)
            found = float(outputs.distance())
            assert found == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    hooks = [m._forward_hooks for model in (student, teacher) for m in model.modules()]
    assert not any(hooks)


def test_outputs_of_layers_come_closer_with_their_weight(family):
    """And parts of a batch add up to the whole."""
    teacher, distances, weights = make(family), [], []
    for features, micro in ((0.0, None), (10.0, None), (10.0, 2)):
        student, outputs = student_of(family), LayerOutputs()
        config = FinetuneConfig(steps=20, batch=4, lr=1e-3, features=features, micro_batch=micro)
        report = finetune(student, teacher, WINDOWS, config)
        assert report.losses[-1] < 0.8 * report.losses[0]
        with torch.no_grad(), outputs.watched(student, teacher):
            last_hidden(teacher, WINDOWS)
            last_hidden(student, WINDOWS)
            distances.append(float(outputs.distance()))
        weights.append([m.weight for m in student_layers(student).values()])
    assert distances[1] < 0.9 * distances[0]
    assert distances[2] == pytest.approx(distances[1], rel=0.05)


def test_settings_out_of_range():
    for changes in ({"average": 1.0}, {"average": -0.1}, {"features": -1.0},
                    {"features": float("nan")}):  # fmt: skip
        with pytest.raises(PruneError, match="FinetuneConfig"):
            FinetuneConfig(**changes)


@pytest.mark.gpu
def test_fast_steps_with_both_are_the_plain_ones():
    """On CUDA: compiled and replayed as a graph against neither; bfloat16 as in practice."""
    start, teacher = student_of("gemma3").to(torch.bfloat16), make("gemma3")
    teacher = teacher.to(torch.bfloat16).cuda()
    runs = {}
    for fast in (False, True):
        config = FinetuneConfig(
            steps=12, batch=4, micro_batch=2, lr=1e-3, warmup=2, average=0.3, features=1.0,
            compile=fast, graph=fast,
        )  # fmt: skip
        tuned = copy.deepcopy(start)
        report = finetune(tuned, teacher, WINDOWS, config)
        runs[fast] = report.losses, [m.weight for m in student_layers(tuned).values()]
    assert runs[True][0] == pytest.approx(runs[False][0], rel=0.1, abs=2e-5)
    firsts = [m.weight for m in student_layers(start).values()]
    for fast, plain, first in zip(runs[True][1], runs[False][1], firsts, strict=True):
        assert float((fast - plain).norm()) < 0.3 * float((plain.cpu() - first).norm())
