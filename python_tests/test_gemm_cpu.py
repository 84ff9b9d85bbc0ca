# SPDX-License-Identifier: Apache-2.0
"""hybrid_gemm on the CPU: every configuration against float64 references."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spense_kernels import ops
from spense_kernels.format import HybridWeight, PackedWeight, Split
from spense_kernels.quant import fp8_to_float, round_fp8
from spense_kernels.testing.generators import (
    AWKWARD_SHAPES,
    ROUND_SHAPES,
    exact_activations,
    exact_weight,
    generator,
    legal_widths,
    random_split,
    random_weight,
    staircase_split,
)
from spense_kernels.testing.numeric import assert_bitwise, tile_diff
from spense_kernels.testing.reference import (
    gathered_weight,
    hybrid_gemm_float64,
    hybrid_gemm_plain,
)

_C = pytest.importorskip("spense_kernels._C")

CONFIGS = _C.cpu.gemm_configs()
# Each way a kernel may treat rows of x: alone, a few at a time, sixteen a vector, several vectors,
# and one beyond a block of rows.
TOKENS = [0, 1, 2, 3, 4, 5, 8, 9, 15, 16, 20, 21, 23, 33, 64, 100, 257, 514]
FAST_CONFIGS = [name for name in CONFIGS if name != "reference"]

all_configs = pytest.mark.parametrize("config", CONFIGS)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small products gain nothing from threads; one test looks at them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def packed_of(weight: HybridWeight) -> PackedWeight:
    return weight.pack()


def gemm(x: Tensor, x_scale: Tensor, weight: HybridWeight, config: str, **kwargs) -> Tensor:
    packed = packed_of(weight)
    return ops.hybrid_gemm(
        x,
        packed.w_packed,
        packed.w_tiles,
        x_scale,
        weight.w_scale,
        weight.bias,
        n=packed.n,
        k=packed.k,
        config=config,
        **kwargs,
    )


def tokens_for(config: str) -> list[int]:
    return [m for m in TOKENS if config != "reference" or m < 10]


def test_reference_and_portable_run_everywhere():
    assert CONFIGS[-2:] == ["portable", "reference"]
    assert len(set(CONFIGS)) == len(CONFIGS)


@all_configs
@pytest.mark.parametrize("shape", AWKWARD_SHAPES + ROUND_SHAPES[:2], ids=str)
def test_exact_on_integers(config, shape):
    """Integer products, partial sums below 2^13, scales that are powers of two: nothing rounds
    before the output type, so every configuration must give the same bits."""
    n, k = shape
    weight = exact_weight(random_split(n, k, seed=n), seed=k, bias=True)
    for m in tokens_for(config):
        x, x_scale = exact_activations(m, k, seed=m)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = gemm(x, x_scale, weight, config, out_dtype=dtype)
            assert_bitwise(out, hybrid_gemm_plain(x, x_scale, weight, dtype))


@all_configs
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_exact_on_shards(config, shards):
    weight = exact_weight(random_split(300, 1024, shards, seed=shards))
    for m in (3, 40):
        x, x_scale = exact_activations(m, 1024, seed=m)
        out = gemm(x, x_scale, weight, config, out_dtype=torch.float32)
        assert_bitwise(out, hybrid_gemm_plain(x, x_scale, weight, torch.float32))


@settings(max_examples=40)
@given(
    n=st.integers(1, 300),
    k=st.integers(1, 700),
    m=st.integers(1, 40),
    seed=st.integers(0, 1 << 16),
    config=st.sampled_from(FAST_CONFIGS),
)
def test_exact_on_any_shape(n, k, m, seed, config):
    weight = exact_weight(random_split(n, k, seed=seed), seed=seed, bias=seed % 2 == 0)
    x, x_scale = exact_activations(m, k, seed=seed)
    out = gemm(x, x_scale, weight, config, out_dtype=torch.float32)
    assert_bitwise(out, hybrid_gemm_plain(x, x_scale, weight, torch.float32))


@all_configs
def test_every_width_of_a_staircase(config):
    """One tile for every legal width, so 0 %, 100 % and each boundary inside a unit."""
    k = 528 if config != "reference" else 272
    widths = legal_widths(k)
    weight = exact_weight(staircase_split(128 * len(widths), k, widths))
    for m in (2, 32):
        x, x_scale = exact_activations(m, k)
        out = gemm(x, x_scale, weight, config, out_dtype=torch.float32)
        assert_bitwise(out, hybrid_gemm_plain(x, x_scale, weight, torch.float32))


def float32_sum_rms(x: Tensor, weight: HybridWeight) -> float:
    """Relative RMS over y that float32 sums may lose.

    A sum of k products has at most k rounded additions, each off by at most 2^-24 of a partial sum,
    and no partial sum exceeds sum |x w|: |error| <= k * 2^-24 * sum |x w| (products of two e4m3
    values have 8 bits and are exact). Its RMS over the RMS of the exact sums bounds the ratio.
    """
    w = gathered_weight(weight).double()
    magnitude = fp8_to_float(x).double().abs() @ w.abs().t()
    bound = weight.split.k * 2.0**-24 * magnitude
    exact = fp8_to_float(x).double() @ w.t()
    return float(bound.square().mean().sqrt() / exact.square().mean().sqrt())


@all_configs
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, 2.0**-24), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)],
    ids=str,
)
def test_random_data_within_float32_sums(config, dtype, rounding):
    """Worst 128 x 128 tile as RMS. Three roundings to float32 (two scales, the bias) and one to the
    output type, each at most half a unit in the last place, come on top of the sums."""
    split = staircase_split(384, 1024, [256, 0, 1024], seed=3)
    weight = random_weight(split, seed=3)
    g = generator(11)
    for m in (4, 24, 140) if config != "reference" else (4,):
        x = round_fp8(torch.randn(m, 1024, generator=g) * 20)
        x_scale = torch.rand(m, generator=g) + 0.5
        out = gemm(x, x_scale, weight, config, out_dtype=dtype)
        diff = tile_diff(out, hybrid_gemm_float64(x, x_scale, weight))
        sums = float32_sum_rms(x, weight)
        # Scales differ by at most 3 within a tile, so the relative error of the sums may, too.
        assert diff.rms <= 9 * sums + 3 * 2.0**-24 + rounding, diff


@all_configs
def test_no_drift_on_long_k(config):
    """All products positive, K = 16384: truncating or bf16 accumulation would drift by far more
    than the k * 2^-24 that float32 rounding allows at worst."""
    k = 16384
    split = Split.uniform(128, k, 4096)
    weight = random_weight(split, seed=5)
    positive = HybridWeight(
        split, weight.values & 0x7F, weight.indices, weight.dense & 0x7F, weight.w_scale
    )
    for m in (1, 32) if config != "reference" else (1,):
        x = round_fp8(torch.rand(m, k, generator=generator(m)) * 100 + 1)
        out = gemm(x, torch.ones(m), positive, config, out_dtype=torch.float32).double()
        ref = hybrid_gemm_float64(x, torch.ones(m), positive)
        assert float(((out - ref).abs() / ref).max()) <= (k + 3) * 2.0**-24


@pytest.fixture(params=[False, True], ids=["ieee", "flush denormals"])
def _flush_denormals(request):
    """Also with the processor's mode that takes float subnormals for zero."""
    if request.param and not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


@all_configs
@pytest.mark.usefixtures("_flush_denormals")
def test_subnormal_weights_and_activations_count(config):
    """Every e4m3 subnormal in x and w; bf16 hardware that flushed them would give zeros."""
    split = Split.uniform(128, 512, 256)
    weight = random_weight(split, seed=7)
    tiny = HybridWeight(
        split, weight.values & 0x87, weight.indices, weight.dense & 0x87, torch.ones(128)
    ).canonical()
    for m in (3, 40):
        x = torch.randint(0, 8, (m, 512), generator=generator(m), dtype=torch.uint8)
        x = x.view(torch.float8_e4m3fn)
        out = gemm(x, torch.ones(m), tiny, config, out_dtype=torch.float32)
        # Multiples of 2^-18 below 512 * 49 * 2^-18: exact in float32.
        assert_bitwise(out, hybrid_gemm_float64(x, torch.ones(m), tiny).float())


@all_configs
def test_all_byte_values_of_x(config):
    """Each finite byte of x alone against a weight of ones."""
    split = Split.uniform(1, 256, 256)
    weight = HybridWeight.from_dense(
        torch.full((1, 256), 0x38, dtype=torch.uint8), torch.ones(1), split
    )
    for m in (1, 40):
        for byte in set(range(256)) - {0x7F, 0xFF}:
            if m == 40 and byte % 5:
                continue
            x = torch.zeros(m, 256, dtype=torch.uint8)
            x[:, byte] = byte
            x = x.view(torch.float8_e4m3fn)
            out = gemm(x, torch.ones(m), weight, config, out_dtype=torch.float32)
            assert_bitwise(out + 0.0, fp8_to_float(x).sum(1, keepdim=True) + 0.0)


@all_configs
@pytest.mark.parametrize("m", [3, 20, 40])
@pytest.mark.parametrize("how", ["byte", "negative byte", "scale"])
def test_nan_stays_in_its_row(config, m, how):
    """A NaN makes its whole row NaN, also at a column that some rows of w prune, and no other."""
    k = 300
    weight = exact_weight(staircase_split(200, k, [0, 128]))
    x, x_scale = exact_activations(m, k)
    clean = gemm(x, x_scale, weight, config, out_dtype=torch.float32)
    for row, column in ((0, 0), (m // 2, k - 1), (m - 1, 137)):
        bad, bad_scale = x.view(torch.uint8).clone(), x_scale.clone()
        if how == "scale":
            bad_scale[row] = torch.nan
        else:
            bad[row, column] = 0x7F if how == "byte" else 0xFF
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = gemm(bad.view(torch.float8_e4m3fn), bad_scale, weight, config, out_dtype=dtype)
            assert out[row].isnan().all()
            others = torch.arange(m) != row
            assert_bitwise(out[others], clean[others].to(dtype))


@all_configs
def test_nothing_behind_k_is_read(config):
    """Columns behind K of a wider buffer hold NaN bytes; rows keep the buffer's stride."""
    k = 200
    weight = exact_weight(Split.uniform(130, k, 64))
    for m in (1, 7, 40):
        x, x_scale = exact_activations(m, k)
        wide = torch.full((m, 333), 0x7F, dtype=torch.uint8)
        wide[:, 1 : 1 + k] = x.view(torch.uint8)
        view = wide.view(torch.float8_e4m3fn)[:, 1 : 1 + k]
        out = gemm(view, x_scale, weight, config)
        assert_bitwise(out, gemm(x.contiguous(), x_scale, weight, config))


@all_configs
def test_one_scale_for_all_rows(config):
    weight = exact_weight(random_split(150, 260, seed=1), bias=True)
    for m in (1, 5, 30):
        x, _ = exact_activations(m, 260)
        one = torch.tensor([0.25])
        assert_bitwise(gemm(x, one, weight, config), gemm(x, one.expand(m).clone(), weight, config))


@all_configs
def test_empty_x(config):
    weight = exact_weight(Split.uniform(130, 64, 16))
    out = gemm(torch.empty(0, 64).to(torch.float8_e4m3fn), torch.empty(0), weight, config)
    assert out.shape == (0, 130)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("config", FAST_CONFIGS)
@pytest.mark.parametrize("m", [1, 20, 130, 530])
def test_bits_do_not_depend_on_threads(config, m):
    """Random data, so that another order of additions would show."""
    weight = random_weight(random_split(300, 900, seed=m))
    x = round_fp8(torch.randn(m, 900, generator=generator(m)) * 20)
    x_scale = torch.rand(m, generator=generator(m + 1))
    results = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        results.append(gemm(x, x_scale, weight, config, out_dtype=torch.float32))
    for result in results[1:]:
        assert_bitwise(result, results[0])


@all_configs
def test_output_rounds_like_torch(config):
    """float32 results rounded to bf16 and fp16, subnormal and overflowing ones included."""
    weight = random_weight(Split.uniform(256, 128, 64), seed=9)
    g = generator(9)
    for m in (4, 40):
        x = round_fp8(torch.randn(m, 128, generator=g) * 20)
        for exponent in (-40.0, -24.0, 0.0, 12.0):
            scale = torch.full((m,), 2.0**exponent)
            full = gemm(x, scale, weight, config, out_dtype=torch.float32)
            for dtype in (torch.bfloat16, torch.float16):
                assert_bitwise(gemm(x, scale, weight, config, out_dtype=dtype), full.to(dtype))
        scale = torch.full((m,), 2.0**-140)  # bf16 subnormals
        full = gemm(x, scale, weight, config, out_dtype=torch.float32)
        assert_bitwise(gemm(x, scale, weight, config), full.to(torch.bfloat16))
