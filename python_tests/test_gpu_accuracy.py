# SPDX-License-Identifier: Apache-2.0
"""hybrid_gemm's rounding errors on a GPU against those of cuBLASLt FP8 on the same weight.

Both sum e4m3 products in the tensor cores' accumulator, which keeps fewer bits than float32, so a
bound from float32 arithmetic would be wrong for either. The yardstick is cuBLASLt's own error on
the dequantised weight: ours is at most 1.1 times it, tile by tile.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from devices import Problem, all_devices, check_bits, every_config
from torch import Tensor

from spense_kernels.format import HybridWeight, Split
from spense_kernels.quant import round_fp8
from spense_kernels.testing.generators import generator, random_weight, staircase_split

FACTOR = 1.1
TILE = 128
# (n, k, dense widths in turn): the layers' K, staircases among them.
LAYERS = [
    (640, 5120, (1280,)),
    (384, 8192, (0, 8192, 2048)),
    (256, 25600, (6400,)),
    (512, 2048, (512, 1024, 0, 256)),
]
CPU_LAYER = (256, 1024, (256, 0))


@lru_cache(maxsize=8)
def problem(n: int, k: int, widths: tuple[int, ...], device: str, positive: bool) -> Problem:
    """Random weights with scales 1, so that sums are compared before anything else rounds."""
    w = random_weight(staircase_split(n, k, widths, seed=k), seed=n)
    mask = 0x7F if positive else 0xFF
    ones = torch.ones(n)
    return Problem(HybridWeight(w.split, w.values & mask, w.indices, w.dense & mask, ones), device)


def activations(m: int, k: int, device: str, positive: bool = False) -> Tensor:
    x = torch.randn(m, k, generator=generator(m + k)) * 16
    return round_fp8(x.abs() if positive else x).to(device)


def library(case: Problem, x: Tensor, fast_accum: bool) -> Tensor:
    """The same sums in float32 by torch's FP8 product (cuBLASLt on a GPU)."""
    one = torch.ones((), device=case.device)
    w = round_fp8(case.plain)
    return torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast_accum)


def ours(case: Problem, x: Tensor, config: str | None, fast_accum: bool) -> Tensor:
    scale = torch.ones(1, device=case.device)
    return case.run(x, scale, config, out_dtype=torch.float32, fast_accum=fast_accum)


def exact(case: Problem, x: Tensor) -> Tensor:
    return x.double() @ case.plain.double().t()


def tile_rms(out: Tensor, ref: Tensor) -> Tensor:
    """RMS error of every tile of 128 rows of the weight and up to 128 tokens, over the RMS of ref.

    Below 16 tokens a tile has too few values for a ratio to mean something: one for all.
    """
    error, power = (out.double() - ref).square(), ref.square()
    if out.shape[0] < 16:
        return (error.mean() / power.mean()).sqrt()[None]
    tiles = [
        error[i : i + TILE, j : j + TILE].mean() / power[i : i + TILE, j : j + TILE].mean()
        for i in range(0, out.shape[0], TILE)
        for j in range(0, out.shape[1], TILE)
        if min(TILE, out.shape[0] - i) >= 16
    ]
    return torch.stack(tiles).sqrt()


def sampling(values: int) -> float:
    """How far the ratio of two RMS over so many values strays by chance: four standard errors."""
    return 4 / values**0.5


def check_error(case: Problem, m: int, config: str | None, fast_accum: bool) -> None:
    k = case.weight.split.k
    x = activations(m, k, case.device)
    ref = exact(case, x)
    mine = tile_rms(ours(case, x, config, fast_accum), ref)
    theirs = tile_rms(library(case, x, fast_accum), ref)
    # Float32 sums have errors of their own that no kernel can avoid.
    floor = 2.0**-24 * k**0.5
    rows = m % TILE if m % TILE >= 16 else min(m, TILE)  # of the smallest tile
    allowed = FACTOR * theirs * (1 + sampling(rows * TILE)) + floor
    worst = (mine / allowed).argmax()
    assert (mine <= allowed).all(), (
        f"{config}, m = {m}, fast_accum = {fast_accum}: tile {int(worst)} has RMS "
        f"{float(mine[worst]):.3e}, cuBLASLt {float(theirs[worst]):.3e}"
    )


def layer_of(device: str, which: int) -> tuple:
    return LAYERS[which] if device == "cuda" else CPU_LAYER


@every_config
@pytest.mark.parametrize("which", range(len(LAYERS)))
def test_error_of_every_configuration(device, config, which):
    case = problem(*layer_of(device, which), device, False)
    for m in (8, 16, 64, 200, 512) if device == "cuda" else (16, 130):
        check_error(case, m, config, fast_accum=True)


@all_devices
@pytest.mark.parametrize("which", range(len(LAYERS)))
def test_error_without_fast_accumulation(device, which):
    """Promoted sums stay within cuBLASLt's with fast accumulation off."""
    case = problem(*layer_of(device, which), device, False)
    for m in (1, 8, 16, 32, 64, 128, 200, 512) if device == "cuda" else (1, 16):
        check_error(case, m, None, fast_accum=False)


@pytest.mark.gpu
def test_promotion_reduces_the_error():
    """fast_accum=False must do something: on long K its error is clearly the smaller one."""
    case = problem(*LAYERS[2], "cuda", False)
    x = activations(64, 25600, "cuda")
    ref = exact(case, x)
    fast, slow = (tile_rms(ours(case, x, None, f), ref).max() for f in (True, False))
    assert slow < 0.5 * fast


def drift(out: Tensor, ref: Tensor) -> Tensor:
    """Mean of the signed relative error over tokens and 128 rows: what truncation leaves."""
    relative = (out.double() - ref) / ref
    return relative.mean(0).view(-1, TILE).mean(1)


@every_config
def test_drift_over_long_k(device, config):
    """All products positive: an accumulator that truncates falls behind; not more than cuBLASLt's
    does. What is added pays for the float32 additions of partial sums."""
    layer = layer_of(device, 2)
    case = problem(*layer, device, True)
    for m in (8, 64, 256) if device == "cuda" else (8,):
        x = activations(m, layer[1], device, positive=True)
        ref = exact(case, x)
        mine = drift(ours(case, x, config, True), ref).abs()
        theirs = drift(library(case, x, True), ref).abs()
        assert (mine <= FACTOR * theirs + 2.0**-24 * layer[1] ** 0.5).all(), (mine, theirs)


@all_devices
def test_drift_without_fast_accumulation(device):
    layer = layer_of(device, 2)
    case = problem(*layer, device, True)
    for m in (1, 8, 64, 256) if device == "cuda" else (8,):
        x = activations(m, layer[1], device, positive=True)
        ref = exact(case, x)
        mine = drift(ours(case, x, None, False), ref).abs()
        theirs = drift(library(case, x, False), ref).abs()
        assert (mine <= FACTOR * theirs + 2.0**-24 * layer[1] ** 0.5).all(), (mine, theirs)


@every_config
def test_subnormals_count(device, config):
    """Weights and activations that are e4m3 subnormals; hardware that flushed them gives zeros."""
    w = random_weight(Split.uniform(256, 512, 128), seed=7)
    tiny = HybridWeight(w.split, w.values & 0x87, w.indices, w.dense & 0x87, torch.ones(256))
    case = Problem(tiny.canonical(), device)
    x = torch.randint(0, 2, (40, 512), generator=generator(1), dtype=torch.uint8).to(device)
    x = x.view(torch.float8_e4m3fn)  # 0 or 2^-9, so that sums below 2^13 of 2^-18 are exact
    out = ours(case, x, config, True)
    assert (out != 0).sum() > out.numel() / 2
    check_bits(out, exact(case, x).float(), f"{config}: subnormals")
