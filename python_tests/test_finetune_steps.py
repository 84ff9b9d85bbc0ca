# SPDX-License-Identifier: Apache-2.0
"""What makes the steps of a fine-tune fast must not change what they compute."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from prune_models import make, student_of
from torch import nn

from spense_kernels.finetune import (
    FinetuneConfig,
    StudentLinear,
    attention,
    finetune,
    loss,
    student,
)
from spense_kernels.finetune import teacher as teacher_module
from spense_kernels.finetune.attention import causal_windows
from spense_kernels.finetune.batches import Batches
from spense_kernels.finetune.fuse import Fused, fused_norms, fused_rotary
from spense_kernels.finetune.student import quantize_weight
from spense_kernels.finetune.teacher import TeacherStates, last_hidden
from spense_kernels.quant import quantize_fp8_reference

WINDOWS = torch.randint(0, 211, (5, 24), generator=torch.Generator().manual_seed(3))
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # unit roundoff


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_codes_are_those_of_rounding_with_clamps():
    """Without a least scale: the scale and the codes of quantize_fp8; with one: its codes."""
    weight = random(20, 48) * torch.logspace(-20, 3, 20)[:, None]
    weight[3] = 0.0
    codes, scale = quantize_weight(weight, torch.zeros(20))
    expected, expected_scale = quantize_fp8_reference(weight)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    # A least scale a hair below what the row needs: its largest code must not become NaN.
    least = scale * (1.0 - 9e-7)
    codes, kept = quantize_weight(weight, least)
    assert torch.equal(kept, least)
    assert codes.float().abs().max() == 448.0
    assert torch.equal(
        quantize_weight(codes.float() * kept[:, None], kept)[0].float(), codes.float()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_within_rounding_of_float64(dtype):
    """Of y = fp8(x) @ fp8(w).T; every factor and result is rounded to dtype at most thrice."""
    m, n, k, unit = 33, 24, 80, UNIT[dtype]
    weight, x = random(n, k), random(m, k, seed=1, dtype=dtype).requires_grad_()
    mask = random(n, k, seed=2) > 0
    layer = StudentLinear(weight, mask)
    grad = random(m, n, seed=3, dtype=dtype)
    layer(x).backward(grad)
    codes, scale = quantize_weight(layer.weight.detach(), layer.scale)
    w = codes.double() * scale.double()[:, None]
    x8, x_scale = quantize_fp8_reference(x.detach())
    rounded = x8.double() * x_scale.double()[:, None]

    def close(found, left, right, keep=1.0):
        exact = left @ right * keep
        length = left.shape[1]
        bound = (3.1 * unit + length * 2.0**-24) * (left.abs() @ right.abs())
        assert bool(((found.double() - exact).abs() <= bound).all())

    close(x.grad, grad.double(), w)
    close(layer.weight.grad, grad.double().T, rounded, mask.double())
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("forms", [((1.0, None), (1.0, None)), ((0.5, None), (0.5, None)),
                                   ((1.0, 3.0), (1.0, 3.0))], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_distance_and_gradient_of_logits(forms, dtype):
    """Against autograd in float64 from the same logits."""
    given, wanted = random(7, 50, dtype=dtype) * 3, random(7, 50, seed=1, dtype=dtype) * 3

    def log_softmax(logits, form):
        logits = logits * form[0]
        logits = logits if form[1] is None else torch.tanh(logits / form[1]) * form[1]
        return logits.log_softmax(dim=-1)

    leaf = given.double().requires_grad_()
    target = log_softmax(wanted.double(), forms[1])
    expected = (target.exp() * (target - log_softmax(leaf, forms[0]))).sum(dim=-1)
    expected.sum().backward()
    grad = torch.empty(7, 64, dtype=dtype)[:, :50]
    found = loss._kl_rows(given, wanted, grad, *forms)
    torch.testing.assert_close(found, expected.detach().float(), rtol=1e-5, atol=2e-6)
    error = (grad.double() - leaf.grad).abs()
    assert bool((error <= UNIT[dtype] * leaf.grad.abs() + 1e-6).all())


def test_parts_of_the_positions_add_up(monkeypatch):
    pupil, teacher = make("llama"), make("llama")
    with torch.no_grad():
        pupil.lm_head.weight.mul_(1.1)
    hidden, target = random(13, 48).requires_grad_(), random(13, 48, seed=1)
    whole = loss.distillation_loss(pupil, teacher, hidden, target)
    whole.backward()
    grad, hidden.grad = hidden.grad, None
    monkeypatch.setattr(loss, "CPU_BYTES", 4 * 211 * 5)
    assert [part.stop for part in loss._parts(hidden, 211)] == [5, 10, 15]
    assert [part.stop for part in loss._parts(hidden[:12], 211)] == [4, 8, 12]
    parts = loss.distillation_loss(pupil, teacher, hidden, target)
    parts.backward()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(hidden.grad, grad, rtol=1e-4, atol=1e-8)


def test_a_head_that_is_no_plain_linear():
    """With a bias its own backward pass is used."""
    pupil, teacher = make("llama"), make("llama")
    head = nn.Linear(48, 211)
    with torch.no_grad():
        head.weight.copy_(pupil.lm_head.weight)
        head.bias.copy_(random(211))
    pupil.lm_head = head
    hidden, target = random(9, 48).requires_grad_(), random(9, 48, seed=1)
    loss.distillation_loss(pupil, teacher, hidden, target).backward()
    again = hidden.detach().clone().requires_grad_()
    wanted = teacher.lm_head(target).log_softmax(dim=-1)
    ((wanted.exp() * (wanted - head(again).log_softmax(dim=-1))).sum() / 9).backward()
    torch.testing.assert_close(hidden.grad, again.grad, rtol=1e-4, atol=1e-7)


def test_states_of_the_teacher_come_once_and_the_same():
    model, device = make("gemma3"), torch.device("cpu")
    calls = []
    handle = model.base_model.register_forward_hook(lambda *_: calls.append(1))
    states = TeacherStates(model, WINDOWS, device, again=True)
    assert states.kept
    found = states.of(torch.tensor([4, 1]))
    again = states.of(torch.tensor([1, 4, 2]))
    assert len(calls) == 3
    handle.remove()
    assert torch.equal(found, again[[1, 0]])
    other = TeacherStates(model, WINDOWS, device, again=True)
    other.fill()
    assert torch.equal(other.of(torch.tensor([1, 4, 2])), again)
    torch.testing.assert_close(again, last_hidden(model, WINDOWS[[1, 4, 2]]), rtol=1e-5, atol=1e-5)
    assert not TeacherStates(model, WINDOWS, device, again=False).kept


@pytest.mark.parametrize("group", [2, 3, 8])
def test_states_by_groups_whose_last_is_no_smaller(group):
    model, sizes = make("gemma3"), []
    states = TeacherStates(model, WINDOWS, torch.device("cpu"), again=True)
    states._group = group
    handle = model.base_model.embed_tokens.register_forward_hook(
        lambda module, args, output: sizes.append(args[0].shape[0])
    )
    found = states.of(torch.tensor([4, 0, 3]))
    states.fill()
    handle.remove()
    assert set(sizes) == {min(group, 5)}
    assert len(sizes) == -(-5 // group)
    assert torch.equal(states.of(torch.tensor([4, 0, 3])), found)
    torch.testing.assert_close(
        states.of(torch.arange(5)), last_hidden(model, WINDOWS), rtol=1e-5, atol=1e-5
    )


def test_states_that_do_not_fit_are_worked_out_each_time(monkeypatch):
    config = FinetuneConfig(steps=4, batch=4, lr=1e-3)
    kept = finetune(student_of("gemma3"), make("gemma3"), WINDOWS, config)
    monkeypatch.setattr(teacher_module, "CPU_BYTES", 0)
    found = finetune(student_of("gemma3"), make("gemma3"), WINDOWS, config)
    assert found.losses == pytest.approx(kept.losses, rel=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_causal_windows_change_no_prediction(family):
    model = make(family, **({"sliding_window": 24} if family == "gemma3" else {}))
    longer = torch.cat([WINDOWS, WINDOWS[:, :8]], dim=1)
    expected = [model(ids).logits for ids in (WINDOWS, longer)]
    with causal_windows(model):
        assert model.config._attn_implementation == attention.NAME
        for ids, logits in zip((WINDOWS, longer), expected, strict=True):
            torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
        known = {(None, 24), (None, 32)} | ({(24, 24)} if family == "gemma3" else set())
        assert attention._causal == known
    assert model.config._attn_implementation == "sdpa"
    # A mask of padding is one that must be kept.
    padding = torch.ones_like(WINDOWS)
    padding[:, :5] = 0
    expected = model(WINDOWS, attention_mask=padding).logits
    with causal_windows(model):
        found = model(WINDOWS, attention_mask=padding).logits
    torch.testing.assert_close(found[:, 5:], expected[:, 5:], rtol=1e-5, atol=1e-5)


def test_fused_norms_come_and_go():
    model = make("gemma3")
    expected = model(WINDOWS).logits
    norms = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
    with fused_norms(model):
        assert all("forward" in vars(m) for m in norms)
        assert torch.equal(model(WINDOWS).logits, expected)
    assert not any("forward" in vars(m) for m in norms)


def test_spliced_windows_are_parts_of_windows_in_their_place():
    windows = torch.arange(40).view(5, 8) * 10
    batches = Batches(windows, FinetuneConfig(batch=64, splice=3))
    rows = batches.rows(3)
    ids = batches.ids(3, rows)
    assert torch.equal(ids[:, 0], windows[rows, 0])
    assert torch.equal(ids % 80, (torch.arange(8) * 10).expand(64, 8))
    changes = (ids.diff(dim=1) != 10).sum(dim=1)
    assert int(changes.max()) == 2
    assert torch.equal(ids, batches.ids(3, rows))
    assert not torch.equal(ids, batches.ids(4, rows))


def test_noise_replaces_its_share_by_tokens_of_the_text():
    windows = torch.randint(0, 1000, (4, 512), generator=torch.Generator().manual_seed(0))
    windows[:, 0] = 5000
    batches = Batches(windows, FinetuneConfig(batch=32, noise=0.25))
    rows = batches.rows(0)
    ids = batches.ids(0, rows)
    replaced = (ids != windows[rows]).float()
    # 16352 draws, standard deviation 0.0034; 1 in 1000 replacements is the token itself.
    assert float(replaced[:, 1:].mean()) == pytest.approx(0.25, abs=0.015)
    assert not bool(replaced[:, 0].any())
    assert set(ids[:, 1:].flatten().tolist()) <= set(windows[:, 1:].flatten().tolist())


def test_changed_windows_are_learnt_from_and_states_not_kept():
    config = FinetuneConfig(steps=30, batch=4, lr=1e-3, splice=2, noise=0.1)
    report = finetune(student_of("gemma3"), make("gemma3"), WINDOWS, config)
    assert report.losses[-1] < 0.7 * report.losses[0]


@pytest.mark.parametrize("family", ["gemma3", "llama", "mistral", "qwen3"])
def test_fused_rotary_comes_and_goes(family):
    model = make(family)
    expected = model(WINDOWS).logits
    file = sys.modules[type(model).__module__]
    plain = file.apply_rotary_pos_emb
    with fused_rotary(model):
        assert isinstance(file.apply_rotary_pos_emb, Fused)
        assert torch.equal(model(WINDOWS).logits, expected)
    assert file.apply_rotary_pos_emb is plain


def test_layers_with_one_input_quantise_it_once(monkeypatch):
    calls = []

    def counted(x):
        calls.append(x)
        return quantize(x)

    quantize = student.ops.quantize_fp8
    monkeypatch.setattr(student.ops, "quantize_fp8", counted)
    layers = [StudentLinear(random(16, 32, seed=i), torch.ones(16, 32).bool()) for i in range(2)]
    x = random(5, 32, seed=3)
    first, second = (layer(x) for layer in layers)
    assert len(calls) == 1
    assert torch.equal(second, layers[1](x.clone()))
    # What changes in place is quantised anew.
    x.mul_(2)
    torch.testing.assert_close(layers[0](x), 2 * first)
    assert len(calls) == 3
    # Changes of these are not counted, so nothing may be kept.
    with torch.inference_mode():
        y = x.clone()
        doubled = layers[0](y)
        y.mul_(0.5)
        torch.testing.assert_close(layers[0](y), 0.5 * doubled)


def test_a_compiler_that_fails_is_told_once(monkeypatch):
    def fail(*args):
        raise torch._dynamo.exc.TorchDynamoException("no C compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    fused = Fused(lambda x: x.value + 1)
    stands_for_cuda = types.SimpleNamespace(is_cuda=True, value=1)
    with pytest.warns(UserWarning, match="no C compiler"):
        assert fused(stands_for_cuda) == 2
    assert fused(stands_for_cuda) == 2
    assert not fused.on


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_fast_steps_are_the_plain_ones(family):
    """On CUDA: compiled and replayed as a graph against neither; bfloat16 as in practice."""
    runs = {}
    start = student_of(family).to(torch.bfloat16)
    teacher = make(family).to(torch.bfloat16).cuda()
    for fast in (False, True):
        config = FinetuneConfig(
            steps=12, batch=4, micro_batch=2, lr=1e-3, warmup=2, compile=fast, graph=fast
        )
        tuned = copy.deepcopy(start)
        report = finetune(tuned, teacher, WINDOWS, config)
        weights = [p for p in tuned.parameters() if p.requires_grad]
        runs[fast] = report.losses, weights
    assert runs[True][0] == pytest.approx(runs[False][0], rel=0.1, abs=2e-5)
    assert runs[True][0][-1] < 0.8 * runs[True][0][0]
    old = [p for p in start.parameters() if p.dtype == torch.float32]
    for fast, plain, first in zip(runs[True][1], runs[False][1], old, strict=True):
        assert float((fast - plain).norm()) < 0.3 * float((plain.cpu() - first).norm())
