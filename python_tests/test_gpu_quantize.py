# SPDX-License-Identifier: Apache-2.0
"""quantize_fp8, pack and unpack on a GPU, bit for bit against their torch twins."""

from __future__ import annotations

import pytest
import torch
from devices import all_devices, cuda, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spense_kernels import ops
from spense_kernels.format import Split, pack_reference
from spense_kernels.layout import padded_k
from spense_kernels.quant import quantize_fp8_reference
from spense_kernels.testing.generators import generator, random_split, random_weight
from spense_kernels.testing.numeric import assert_bitwise
from spense_kernels.testing.op_inputs import pack_call

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# One CTA a row or several, several rows a CTA, rows longer than shared memory, K in any state.
SHAPES = [
    *[(1, 1), (3, 127), (5, 128), (2, 129), (1, 5120), (16, 5120), (64, 8192), (7, 25600)],
    *[(130, 640), (600, 1000), (1060, 5120), (2200, 640), (2201, 264), (4300, 72), (2, 120000)],
]
CPU_SHAPES = [(3, 127), (70, 264), (1, 5120)]


def check(x: Tensor, gather: Tensor | None, device: str, there: Tensor | None = None) -> None:
    """The op on `device` (on `there`, if it holds the same numbers there) against the twin."""
    with poisoned():
        got, scale = ops.quantize_fp8(
            x.to(device) if there is None else there, None if gather is None else gather.to(device)
        )
    wanted, wanted_scale = quantize_fp8_reference(x, gather)
    m, k = x.shape
    assert got.stride() == (padded_k(k), 1)
    whole = got.as_strided((m, padded_k(k)), (padded_k(k), 1)).view(torch.uint8).cpu()
    assert not whole[:, k:].any(), "padding"
    assert_bitwise(whole[:, :k], wanted.view(torch.uint8))
    finite = ~wanted_scale.isnan()
    assert torch.equal(~scale.cpu().isnan(), finite)
    assert_bitwise(scale.cpu()[finite], wanted_scale[finite])


def data(m: int, k: int, dtype: torch.dtype) -> Tensor:
    g = generator(m * 7 + k)
    x = torch.randn(m, k, generator=g) * 10 ** torch.randn(m, 1, generator=g)
    return x.to(dtype)


@all_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_twin(device, dtype, shape):
    if device == "cpu" and shape not in CPU_SHAPES:
        shape = CPU_SHAPES[0]
    m, k = shape
    x = data(m, k, dtype)
    check(x, None, device)
    check(x, torch.randperm(k, generator=generator(k), dtype=torch.int32), device)
    check(x, torch.randint(k, (k,), generator=generator(k), dtype=torch.int32), device)


@all_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [3, 1100])
def test_rows_of_a_wider_buffer(device, dtype, m):
    """Any stride and any address; NaN between the rows must not be read."""
    m = m if device == "cuda" else 3
    for k, stride, offset in [(300, 500, 50), (256, 257, 1), (320, 328, 8), (130, 1000, 3)]:
        x = data(m, k, dtype)
        buffer = torch.full((offset + m * stride,), torch.nan, dtype=dtype, device=device)
        rows = buffer.as_strided((m, k), (stride, 1), offset)
        rows.copy_(x)
        check(x, torch.randperm(k, dtype=torch.int32), device, rows)


@all_devices
def test_more_rows_than_a_grid_dimension_holds(device):
    m = 70000 if device == "cuda" else 700
    check(data(m, 24, torch.bfloat16), torch.randperm(24, dtype=torch.int32), device)


@all_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_pattern(device, dtype):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(256, 256)
    check(bits.view(dtype), None, device)
    many = bits.view(dtype).repeat(9, 1)  # so many rows that several share a CTA
    check(many, torch.randperm(256, dtype=torch.int32), device)


@all_devices
def test_ties_saturation_and_subnormals(device):
    e4m3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (e4m3[1:] + e4m3[:-1]) / 2
    near = torch.cat([middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(e4m3[-1])])
    row = torch.cat([e4m3, near, -e4m3, -near])
    for factor in (1.0, 1e-30, 3e-5, 7.0, 1e30):
        check((row * factor)[None], None, device)
        check((row * factor).repeat(1300, 1), None, device)


@all_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_that_is_not_finite(device, dtype, bad):
    for m, k in [(4, 40), (5, 5120), (1100, 300)]:
        x = data(m, k, dtype)
        x[1, k // 2] = bad
        x[m - 1, k - 1] = bad
        check(x, torch.randperm(k, dtype=torch.int32), device)


@all_devices
def test_zeros_and_tiny_rows(device):
    x = torch.zeros(5, 70)
    x[1] = -0.0
    x[2, 3] = 1e-7
    x[3] = 1e-38
    x[4] = 1e-13
    for dtype in DTYPES:
        check(x.to(dtype), None, device)
        check(x.to(dtype).repeat(300, 1), None, device)


@pytest.mark.gpu
@settings(max_examples=200)
@given(
    m=st.integers(1, 3000),
    k=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    gather=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_any_shape(m, k, dtype, gather, seed):
    g = generator(seed)
    x = (torch.randn(m, k, generator=g) * 3).to(dtype)
    check(x, torch.randperm(k, generator=g, dtype=torch.int32) if gather else None, "cuda")


@pytest.mark.gpu
def test_gather_outside_the_columns_reads_nothing_else():
    """The GPU does not look at the entries before it runs; a wrong one must stay harmless."""
    x = torch.randn(5, 256, dtype=torch.bfloat16, device="cuda")
    gather = torch.arange(256, dtype=torch.int32, device="cuda")
    gather[[0, 100]] = torch.tensor([-1, 1 << 30], dtype=torch.int32, device="cuda")
    x8, _ = ops.quantize_fp8(x, gather)
    torch.cuda.synchronize()
    assert x8.float().isfinite().all()


PACKED = [(200, 512, 1), (130, 256, 4), (1, 3, 1), (257, 1056, 2), (1280, 5120, 8), (384, 640, 1)]


@pytest.mark.parametrize("device", [cuda])
@pytest.mark.parametrize("shape", PACKED, ids=str)
def test_pack_and_unpack_give_the_twin_s_bytes(device, shape):
    n, k, shards = shape
    for seed in range(3):
        weight = random_weight(random_split(n, k, shards, seed), seed, negative_zeros=0.05)
        split = weight.split
        arrays = weight.values, weight.indices, weight.dense
        with poisoned():
            w_packed, w_tiles = ops.pack(
                *(t.to(device) for t in arrays), split.widths, n=n, k=k, k_shards=shards
            )
            back = ops.unpack(w_packed, w_tiles, split.widths, n=n, k=k, k_shards=shards)
        wanted, wanted_tiles = pack_reference(*arrays, split)
        assert_bitwise(w_packed, wanted)
        assert_bitwise(w_tiles, wanted_tiles)
        for got, original in zip(back, arrays, strict=True):
            assert_bitwise(got, original)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "place", "byte"),
    [("indices", 5, 0x40), ("indices", 5, 0xF4), ("values", 9, 0x7F), ("dense", 3, 0xFF)],
)
def test_pack_refuses_what_the_cpu_refuses(name, place, byte):
    call = pack_call(n=200, k=512, dense_width=[128, 256])
    broken = call.args[name].clone()
    broken[place] = byte
    call = call.with_argument(name, broken)
    with pytest.raises(RuntimeError) as on_cpu:
        call()
    with pytest.raises(RuntimeError) as on_gpu:
        call.to("cuda")()
    words = [str(e.value).split("Exception raised")[0].strip() for e in (on_cpu, on_gpu)]
    assert words[0].splitlines()[0] == words[1].splitlines()[0]


@pytest.mark.gpu
def test_a_large_layer_packs_like_a_small_one():
    """51200 x 5120: offsets beyond 2^27; some of its tiles against the twin."""
    split = Split.uniform(51200, 5120, 1280)
    small = Split.uniform(128, 5120, 1280)
    weight = random_weight(small, seed=1)
    arrays = [t.repeat(400).cuda() for t in (weight.values, weight.indices, weight.dense)]
    w_packed, _ = ops.pack(*arrays, split.widths, n=51200, k=5120)
    wanted, _ = pack_reference(weight.values, weight.indices, weight.dense, small)
    tiles = w_packed.view(400, -1)
    assert torch.equal(tiles, wanted.cuda().expand(400, -1))
