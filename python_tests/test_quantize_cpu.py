# SPDX-License-Identifier: Apache-2.0
"""quantize_fp8 on the CPU: every configuration, bit for bit, against the torch twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spense_kernels import ops
from spense_kernels.layout import padded_k
from spense_kernels.quant import quantize_fp8_reference
from spense_kernels.testing.generators import generator
from spense_kernels.testing.numeric import assert_bitwise

_C = pytest.importorskip("spense_kernels._C")

CONFIGS = _C.cpu.quantize_configs()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def quantize(config: str, x: Tensor, gather: Tensor | None = None) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    y = torch.full((m, padded_k(k)), 0xAA, dtype=torch.uint8)
    scale = torch.full((m,), -1.0)
    rows = _C.cpu.Rows(
        m,
        k,
        str(x.dtype).removeprefix("torch."),
        x.data_ptr(),
        0 if gather is None else gather.data_ptr(),
        y.data_ptr(),
        y.stride(0),
        scale.data_ptr(),
    )
    _C.cpu.quantize(config, rows)
    assert not y[:, k:].any()
    return y[:, :k], scale


def check(config: str, x: Tensor, gather: Tensor | None = None) -> None:
    y, scale = quantize(config, x, gather)
    wanted, wanted_scale = quantize_fp8_reference(x, gather)
    assert_bitwise(y, wanted.view(torch.uint8))
    finite = ~wanted_scale.isnan()
    assert torch.equal(~scale.isnan(), finite)
    assert_bitwise(scale[finite], wanted_scale[finite])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 16, 127, 128, 255, 256, 257, 640, 1000])
def test_equals_the_twin(config, dtype, k):
    g = generator(k)
    x = (torch.randn(5, k, generator=g) * 10 ** torch.randn(5, 1, generator=g)).to(dtype)
    check(config, x)
    check(config, x, torch.randperm(k, generator=g, dtype=torch.int32))
    check(config, x, torch.randint(k, (k,), generator=g, dtype=torch.int32))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_finite_half_as_a_row_of_its_magnitude(config, dtype):
    """All 65,536 patterns, in rows of similar magnitude so that none is lost below the scale;
    infinities and NaNs make up rows of their own."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(256, 256)
    check(config, bits.view(dtype))


@pytest.mark.parametrize("config", CONFIGS)
def test_ties_saturation_and_subnormals(config):
    """With amax 448 the scale is 1 (to one rounding), so the values meet e4m3's grid directly."""
    e4m3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (e4m3[1:] + e4m3[:-1]) / 2
    near = torch.cat([middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(e4m3[-1])])
    row = torch.cat([e4m3, near, -e4m3, -near])
    check(config, row[None])
    for factor in (1e-30, 3e-5, 7.0, 1e30):
        check(config, (row * factor)[None])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_that_is_not_finite(config, dtype, bad):
    for k in (1, 40, 300):
        x = torch.randn(4, k, generator=generator(k)).to(dtype)
        x[1, k // 2] = bad
        x[3, k - 1] = bad
        check(config, x)
        y, scale = quantize(config, x)
        assert (y[1::2] == 0x7F).all()
        assert scale[1::2].isnan().all()
        assert not scale[::2].isnan().any()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_tiny_rows(config, dtype):
    x = torch.zeros(5, 70)
    x[1] = -0.0
    x[2, 3] = 1e-7
    x[3] = 1e-38
    x[4] = 1e-13
    check(config, x.to(dtype))


@settings(max_examples=60)
@given(
    m=st.integers(1, 6),
    k=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 16),
    spread=st.floats(0.0, 4.0),
)
def test_configs_agree_on_anything(m, k, dtype, seed, spread):
    g = generator(seed)
    x = torch.randn(m, k, generator=g) * torch.exp(spread * torch.randn(m, k, generator=g))
    for config in CONFIGS:
        check(config, x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_takes_rows_of_a_wider_buffer(dtype):
    buffer = torch.full((9, 500), torch.nan, dtype=dtype)
    x = torch.randn(9, 300, generator=generator(1)).to(dtype)
    buffer[:, 50:350] = x
    gather = torch.randperm(300, dtype=torch.int32)
    x8, scale = ops.quantize_fp8(buffer[:, 50:350], gather)
    wanted, wanted_scale = quantize_fp8_reference(x, gather)
    assert_bitwise(x8.view(torch.uint8), wanted.view(torch.uint8))
    assert_bitwise(scale, wanted_scale)
