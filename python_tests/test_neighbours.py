# SPDX-License-Identifier: Apache-2.0
"""Norms and gated activations with quantisation: every CPU configuration gives the same bits, the
norms those of the steps in torch, the activations what float64 allows; devices agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from spense_kernels import ops
from spense_kernels.layout import padded_k
from spense_kernels.quant import quantize_fp8_reference
from spense_kernels.testing.generators import generator, random_activations
from spense_kernels.testing.neighbours import (
    GATED_ERROR,
    NORM_ERROR,
    gated_float64,
    norm_float64,
    quantized_excess,
)
from spense_kernels.testing.numeric import assert_bitwise

_C = pytest.importorskip("spense_kernels._C")

CONFIGS = _C.cpu.quantize_configs()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COLUMNS = [1, 3, 16, 127, 255, 640, 1000]
EPS = 1e-6
GATED = {"silu": None, "tanh": "tanh", "none": "none"}  # id -> approximate of the GELU


def norm_by(config: str, x: Tensor, weight: Tensor, gather=None, residual=None):
    """x8 bytes, scale, sum of a named configuration; weight is float32 and complete."""
    rows, y, scale = rows_of(x, gather)
    total = x if residual is None else torch.empty_like(x)
    _C.cpu.norm(
        config,
        rows,
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else total.data_ptr(),
        weight.data_ptr(),
        EPS,
    )
    return y[:, : x.shape[1]], scale, total


def gated_by(config: str, gate: Tensor, up: Tensor, kind: str, gather=None):
    rows, y, scale = rows_of(gate, gather)
    _C.cpu.gated(config, rows, up.data_ptr(), list(GATED).index(kind))
    return y[:, : gate.shape[1]], scale


def rows_of(x: Tensor, gather: Tensor | None):
    m, k = x.shape
    y, scale = torch.full((m, padded_k(k)), 0xAA, dtype=torch.uint8), torch.full((m,), -1.0)
    pointers = (x.data_ptr(), 0 if gather is None else gather.data_ptr(), y.data_ptr())
    name = str(x.dtype).removeprefix("torch.")
    return _C.cpu.Rows(m, k, name, *pointers, y.stride(0), scale.data_ptr()), y, scale


def norm_in_torch(x: Tensor, weight: Tensor, unit_offset: bool) -> Tensor:
    """The steps that the docstring of rms_norm_quantize lists; v, float32."""
    wide = x.float()
    p = pad(wide.square(), (0, -wide.shape[1] % 8)).unflatten(1, (-1, 8))
    for _ in range(3):
        p = p[..., ::2] + p[..., 1::2]
    q = p.double().sum(dim=(1, 2)).float()[:, None]
    one = torch.ones((), dtype=torch.float32)
    mean = q / torch.tensor(float(x.shape[1])) + torch.tensor(EPS)
    r = one / mean.double().sqrt().float()  # torch's float32 sqrt may be off by a bit
    w = weight.float()
    return (wide * (one + w if unit_offset else w)) * r


def check_quantized(x8: Tensor, scale: Tensor, v: Tensor, gather: Tensor | None) -> None:
    wanted, wanted_scale = quantize_fp8_reference(v, gather)
    assert_bitwise(x8.view(torch.uint8), wanted.view(torch.uint8))
    finite = ~wanted_scale.isnan()
    assert torch.equal(~scale.isnan(), finite)
    assert_bitwise(scale[finite], wanted_scale[finite])


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", COLUMNS)
def test_norms_are_the_steps_bit_for_bit(k, dtype, unit_offset):
    g = generator(k)
    x = (torch.randn(5, k, generator=g) * 10 ** torch.randn(5, 1, generator=g)).to(dtype)
    residual = torch.randn(5, k, generator=g).to(dtype)
    gather = torch.randperm(k, generator=g, dtype=torch.int32)
    for weight in (torch.randn(k, generator=g), torch.randn(k, generator=g).to(dtype)):
        keys = {"eps": EPS, "unit_offset": unit_offset}
        x8, scale = ops.rms_norm_quantize(x, weight, gather, **keys)
        check_quantized(x8, scale, norm_in_torch(x, weight, unit_offset), gather)
        x8, scale, total = ops.add_rms_norm_quantize(x, residual, weight, **keys)
        assert_bitwise(total, (x.float() + residual.float()).to(dtype))
        check_quantized(x8, scale, norm_in_torch(total, weight, unit_offset), None)
        # The steps themselves are close to exact arithmetic.
        v, _ = norm_float64(x, weight, EPS, unit_offset, residual)
        assert quantized_excess(x8, scale, v, NORM_ERROR) <= 0


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", COLUMNS)
def test_activations_are_within_their_bound(k, dtype, kind):
    g = generator(k)
    both = (torch.randn(6, 2 * k, generator=g) * 4).to(dtype)
    gate, up = both[:, :k], both[:, k:]
    gather = torch.randperm(k, generator=g, dtype=torch.int32)
    x8, scale = run_gated(gate, up, kind, gather)
    v = gated_float64(gate, up, GATED[kind])[:, gather.long()]
    assert quantized_excess(x8, scale, v, GATED_ERROR) <= 0


def run_gated(gate: Tensor, up: Tensor, kind: str, gather: Tensor | None):
    if kind == "silu":
        return ops.silu_mul_quantize(gate, up, gather)
    return ops.gelu_mul_quantize(gate, up, gather, approximate=kind)


@pytest.mark.parametrize("kind", GATED)
def test_activations_alone_are_within_their_bound(kind):
    """Each value in a row of its own is the row's maximum, so the scale shows it in float32."""
    steps = torch.linspace(-11, 11, 4001)
    special = torch.tensor([0.0, 1e-6, -1e-6, 30.0, 80.0, 1e4])
    gate = torch.cat([steps, special])[:, None]
    _, scale = run_gated(gate, torch.ones_like(gate), kind, None)
    v = gated_float64(gate, torch.ones_like(gate), GATED[kind]).abs()[:, 0]
    exact = v.clamp_min(1e-12) / 448
    assert float(((scale.double() - exact).abs() / exact).max()) < GATED_ERROR


def test_gelu_far_below_zero_is_within_its_bound():
    """A large `up` lifts the normal distribution's tail above the floor of a row's maximum."""
    gate = torch.linspace(-12.5, -5, 4001)[:, None]
    up = torch.full_like(gate, 1e33)
    _, scale = run_gated(gate, up, "none", None)
    exact = gated_float64(gate, up, "none").abs()[:, 0] / 448
    assert float(((scale.double() - exact).abs() / exact).max()) < GATED_ERROR


@pytest.mark.parametrize("kind", GATED)
def test_a_bound_that_is_too_small_is_noticed(kind):
    """quantized_excess is no rubber stamp: 1 % on the activation breaks it."""
    gate, up = random_activations(8, 640, seed=1).chunk(2, dim=1)
    x8, scale = run_gated(gate, up, kind, None)
    v = gated_float64(gate, up, GATED[kind])
    assert quantized_excess(x8, scale, v, GATED_ERROR) <= 0
    assert quantized_excess(x8, scale, v * 1.01, GATED_ERROR) > 0
    wrong = x8.clone()
    byte = wrong.view(torch.uint8)
    byte[3, 5] ^= 1
    assert quantized_excess(wrong, scale, v, GATED_ERROR) > 0


@pytest.mark.parametrize("config", CONFIGS)
@settings(max_examples=40)
@given(
    m=st.integers(1, 5),
    k=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 16),
    spread=st.floats(0.0, 3.0),
)
def test_configurations_agree_bit_for_bit(config, m, k, dtype, seed, spread):
    g = generator(seed)
    x, other = (
        (torch.randn(m, k, generator=g) * torch.exp(spread * torch.randn(m, k, generator=g))).to(
            dtype
        )
        for _ in range(2)
    )
    weight = torch.randn(k, generator=g)
    gather = torch.randperm(k, generator=g, dtype=torch.int32)
    for residual in (None, other):
        got = norm_by(config, x, weight, gather, residual)
        for a, b in zip(got, norm_by("reference", x, weight, gather, residual), strict=True):
            assert_bitwise(a, b)
    for kind in GATED:
        got = gated_by(config, x, other, kind, gather)
        for a, b in zip(got, gated_by("reference", x, other, kind, gather), strict=True):
            assert_bitwise(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_that_is_not_finite(dtype, bad):
    x = torch.randn(4, 40, generator=generator(1)).to(dtype)
    ones = torch.ones_like(x)
    x[1, 7] = bad
    weight = torch.ones(40)
    results = {
        "norm": ops.rms_norm_quantize(x, weight, eps=EPS),
        "add": ops.add_rms_norm_quantize(ones, x, weight, eps=EPS)[:2],
        "up": ops.silu_mul_quantize(ones, x),
        **{kind: run_gated(x, ones, kind, None) for kind in GATED},
    }
    for name, (x8, scale) in results.items():
        # silu and gelu of -inf are 0 in the limit, and -inf * 0 in arithmetic: both are legal.
        if bad == -torch.inf and name in GATED and not scale[1].isnan():
            continue
        assert scale[1].isnan(), name
        assert (x8[1].view(torch.uint8) == 0x7F).all(), name
        assert not scale[[0, 2, 3]].isnan().any(), name


def test_zero_rows_keep_a_positive_scale():
    zeros = torch.zeros(2, 30, dtype=torch.bfloat16)
    for x8, scale in (
        ops.rms_norm_quantize(zeros, torch.ones(30), eps=EPS),
        ops.silu_mul_quantize(zeros, zeros),
    ):
        assert (scale > 0).all()
        assert not x8.view(torch.uint8).any()


def test_rows_of_a_wider_buffer_and_padding():
    wide = torch.full((5, 700), torch.nan, dtype=torch.bfloat16)
    x = random_activations(5, 300)
    wide[:, 11:311] = x
    weight = torch.randn(300)
    for got, wanted in zip(
        ops.add_rms_norm_quantize(wide[:, 11:311], wide[:, 11:311], weight, eps=EPS),
        ops.add_rms_norm_quantize(x, x, weight, eps=EPS),
        strict=True,
    ):
        assert_bitwise(got, wanted)
    x8, _ = ops.silu_mul_quantize(wide[:, 11:311], wide[:, 11:311])
    assert x8.stride() == (384, 1)
    assert not x8.as_strided((5, 384), (384, 1)).view(torch.uint8)[:, 300:].any()
