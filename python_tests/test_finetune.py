# SPDX-License-Identifier: Apache-2.0
"""The light fine-tune on tiny models: same arithmetic as the kernel, fixed masks, resumable."""

from __future__ import annotations

import copy

import pytest
import torch
from prune_models import make, quick, tokens_for_calibration

from spense_kernels.errors import PruneError, SpenseError
from spense_kernels.finetune import (
    FinetuneConfig,
    StudentLinear,
    finetune,
    finish_student,
    make_student,
    student_layers,
    train,
)
from spense_kernels.finetune.loss import distillation_loss
from spense_kernels.finetune.student import kept_places
from spense_kernels.linear import SpenseLinear
from spense_kernels.prune import prune_model, shallow_clone
from spense_kernels.prune.mask import is_2to4

WINDOWS = torch.randint(0, 211, (5, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def teacher(family):
    return make(family)


@pytest.fixture(scope="module")
def pruned(teacher):
    target = shallow_clone(teacher)
    settings = quick(strategy="staircase", widths=(0.0, 0.5, 1.0))
    prune_model(target, tokens_for_calibration(), settings)
    return target


def student_of(pruned):
    return make_student(copy.deepcopy(pruned))


def kl(student, teacher, windows=WINDOWS) -> float:
    with torch.no_grad():
        wanted = teacher(windows).logits.log_softmax(dim=-1)
        given = student(windows).logits.log_softmax(dim=-1)
    return float((wanted.exp() * (wanted - given)).sum(dim=-1)[:, :-1].mean())


def test_a_student_computes_what_the_kernel_computes(pruned):
    student = student_of(pruned)
    layers = student_layers(student)
    spense = {n: m for n, m in pruned.named_modules() if isinstance(m, SpenseLinear)}
    assert set(layers) == set(spense)
    for name, layer in layers.items():
        x = torch.randn(3, 7, layer.in_features, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), spense[name](x), rtol=1e-5, atol=1e-6)


def test_there_and_back_keeps_the_bits(pruned):
    back = finish_student(student_of(pruned))
    for name, layer in pruned.named_modules():
        if isinstance(layer, SpenseLinear):
            assert layer.hybrid_weight().equal(back.get_submodule(name).hybrid_weight()), name


def test_kept_places_are_dense_columns_and_nonzeros(pruned):
    layer = next(m for m in pruned.modules() if isinstance(m, SpenseLinear))
    weight, split = layer.hybrid_weight().dequantize(), layer.split
    weight[:] = 0.0
    keep = kept_places(weight, split)
    for row in range(split.n):
        assert int(keep[row].sum()) == split.k_shards * int(split.dense_width[row // 128])


def test_gradients_are_straight_through():
    """The backward pass is that of x @ w.T with both rounded, and stops at the mask."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator)
    mask = torch.rand(16, 32, generator=generator) > 0.5
    layer = StudentLinear(weight, mask, None, None)
    x = torch.randn(5, 32, generator=generator).requires_grad_()
    grad = torch.randn(5, 16, generator=generator)
    layer(x).backward(grad)
    rounded = copy.deepcopy(layer).requires_grad_(False)
    columns = rounded(torch.eye(32))  # of the rounded weight: ones and zeros round to themselves
    torch.testing.assert_close(x.grad, grad @ columns.T, rtol=1e-5, atol=1e-5)
    assert not bool(layer.weight.grad[~mask].any())
    error = (layer.weight.grad - (grad.T @ x.detach()) * mask).norm()
    assert float(error / layer.weight.grad.norm()) < 0.05  # x is rounded to FP8


def test_loss_and_its_gradient_against_autograd(teacher):
    generator = torch.Generator().manual_seed(0)
    student = make("gemma3" if teacher.config.model_type.startswith("gemma3") else "llama")
    hidden = torch.randn(9, 48, generator=generator).requires_grad_()
    target = torch.randn(9, 48, generator=generator)
    loss = distillation_loss(student, teacher, hidden, target)
    loss.backward()
    again = hidden.detach().clone().requires_grad_()
    wanted = teacher.lm_head(target).log_softmax(dim=-1)
    expected = (wanted.exp() * (wanted - student.lm_head(again).log_softmax(dim=-1))).sum() / 9
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(hidden.grad, again.grad, rtol=1e-4, atol=1e-7)


def test_it_comes_closer_and_masks_stay(pruned, teacher):
    student = student_of(pruned)
    masks = {n: m.mask.clone() for n, m in student_layers(student).items()}
    frozen = {n: p.clone() for n, p in student.named_parameters() if not p.requires_grad}
    before = kl(student, teacher)
    report = finetune(student, teacher, WINDOWS, FinetuneConfig(steps=30, batch=4, lr=1e-3))
    assert len(report.losses) == 30
    assert report.losses[0] == pytest.approx(before, rel=0.5)
    assert kl(student, teacher) < 0.5 * before
    for name, layer in student_layers(student).items():
        assert torch.equal(layer.mask, masks[name])
        assert not bool(layer.weight[~layer.mask].any())
    trained = {f"{name}.weight" for name in masks}
    for name, parameter in student.named_parameters():
        assert name in trained or torch.equal(parameter, frozen[name]), name
    done = finish_student(student)
    assert kl(done, teacher) < 0.5 * before
    layer = next(m for m in done.modules() if isinstance(m, SpenseLinear))
    weight, split = layer.hybrid_weight().dequantize(), layer.split
    stop = split.k - split.k_shards * split.widths[0]
    assert is_2to4(weight[:128][:, split.gather()[: stop // 4 * 4].long()])


def test_micro_batches_add_up(pruned, teacher):
    whole, parts = student_of(pruned), student_of(pruned)
    finetune(whole, teacher, WINDOWS, FinetuneConfig(steps=2, batch=4))
    finetune(parts, teacher, WINDOWS, FinetuneConfig(steps=2, batch=4, micro_batch=1))
    other = student_layers(parts)
    for name, layer in student_layers(whole).items():
        torch.testing.assert_close(layer.weight, other[name].weight, rtol=1e-3, atol=2e-5)


def test_resume_takes_the_same_steps(pruned, teacher, tmp_path):
    config = FinetuneConfig(steps=6, batch=2, save_every=2, lr=1e-3)
    straight = student_of(pruned)
    finetune(straight, teacher, WINDOWS, config)
    stopped = student_of(pruned)

    class Stop(Exception):
        pass

    class Progress:
        steps = 0

        def start(self, stage, total):
            pass

        def advance(self, count=1):
            self.steps += count
            if self.steps == 3:
                raise Stop

        def finish(self):
            pass

    with pytest.raises(Stop):
        finetune(stopped, teacher, WINDOWS, config, work_dir=tmp_path, progress=Progress())
    resumed = student_of(pruned)
    report = finetune(resumed, teacher, WINDOWS, config, work_dir=tmp_path)
    assert report.first_step == 2
    other = student_layers(resumed)
    for name, layer in student_layers(straight).items():
        assert torch.equal(layer.weight, other[name].weight), name
    with pytest.raises(PruneError, match="another model"):
        finetune(student_of(pruned), teacher, WINDOWS[:3], config, work_dir=tmp_path)


def test_bad_input(pruned, teacher):
    with pytest.raises(PruneError, match="SpenseLinear"):
        make_student(shallow_clone(teacher))
    with pytest.raises(PruneError, match="StudentLinear"):
        finetune(shallow_clone(teacher), teacher, WINDOWS)
    with pytest.raises(PruneError, match="calibration must be int64"):
        finetune(student_of(pruned), teacher, WINDOWS.float())
    for changes in ({"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"batch": 1.5},
                    {"micro_batch": 0}, {"lr_end": 2.0}, {"clip": -1.0},
                    {"splice": 0}, {"noise": 1.0}, {"noise": float("nan")}):  # fmt: skip
        with pytest.raises(PruneError, match="FinetuneConfig"):
            FinetuneConfig(**changes)


def test_a_loss_that_is_no_number_is_an_error(pruned, teacher):
    student = student_of(pruned)
    with torch.no_grad():
        next(iter(student_layers(student).values())).weight.fill_(float("nan"))
    with pytest.raises(SpenseError, match="the loss of step 0"):
        finetune(student, teacher, WINDOWS, FinetuneConfig(steps=1, batch=2))


class HalfSeconds:
    """A clock that every step moves by 0.5 s; stands for the time module and for the progress."""

    def __init__(self):
        self.now, self.stages = 0.0, []

    def monotonic(self):
        return self.now

    def start(self, stage, total):
        self.stages.append(total)

    def advance(self, count=None):
        self.now += 0.5 if count is None else 0.0

    def finish(self):
        pass


def test_minutes_become_the_steps_that_fit(pruned, teacher, tmp_path, monkeypatch):
    """The schedule ends with the run, in the time asked for; a second call has nothing left."""
    clock = HalfSeconds()
    monkeypatch.setattr(train, "time", clock)
    config = FinetuneConfig(minutes=6.0 / 60, batch=2, lr=1e-3)
    options = {"work_dir": tmp_path, "progress": clock}
    report = finetune(student_of(pruned), teacher, WINDOWS, config, **options)
    assert len(report.losses) == report.config.steps == clock.stages[-1] == 13
    assert report.config.warmup == 6
    assert report.config.share(12) < 0.1
    assert clock.now == pytest.approx(6.0, abs=0.5)
    again = finetune(student_of(pruned), teacher, WINDOWS, config, **options)
    assert again.first_step == again.config.steps == 13
    assert not again.losses
    with pytest.raises(PruneError, match="another model"):
        finetune(student_of(pruned), teacher, WINDOWS, FinetuneConfig(), work_dir=tmp_path)


def test_steps_fitted_to_a_time():
    config = FinetuneConfig(minutes=1.0)
    assert config.fitted(6, 0.5, 57.0).steps == 120
    assert config.fitted(6, 0.5, 57.0).warmup == 20
    assert config.fitted(6, 0.5, 10.0).warmup == 6
    assert config.fitted(6, 0.5, -1.0).steps == 6
    for minutes in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PruneError, match="minutes must be above 0"):
            FinetuneConfig(minutes=minutes)
