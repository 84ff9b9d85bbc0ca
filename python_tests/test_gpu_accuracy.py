# SPDX-License-Identifier: Apache-2.0
"""hybrid_gemm's rounding errors on a GPU against those of cuBLASLt FP8 on the same weight.

Both sum e4m3 products in the tensor cores' accumulator, which keeps fewer bits than float32, so a
bound from float32 arithmetic would be wrong for either. The yardstick is cuBLASLt's own error on
the dequantised weight: ours is at most 1.1 times it, tile by tile.

A sum that is cut along K rounds less, and both libraries cut it where there are few output tiles.
So every configuration is compared where neither needs to, on weights of many row tiles, and the
op's own choice on the shapes that models have. Row tiles do not depend on one another: a weight is
a few of them over and over, and the float64 reference is computed for these alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import pytest
import torch
from devices import Problem, all_devices, check_bits, every_config
from torch import Tensor

from spense_kernels import ops
from spense_kernels.format import HybridWeight, Split
from spense_kernels.format.tile_stream import tile_table
from spense_kernels.quant import round_fp8
from spense_kernels.testing.generators import (
    exact_weight,
    generator,
    random_weight,
    staircase_split,
)

FACTOR = 1.1
TILE = 128
MANY_TILES = 272  # two a multiprocessor: nobody needs to cut K
MODEL_ROWS = 5120  # of the projections back into a model, which have the longest K

Layer = tuple[int, tuple[int, ...]]  # K, dense widths of its different row tiles
LAYERS: list[Layer] = [
    (5120, (1280, 1280)),
    (8192, (1024, 3072)),
    (25600, (6400, 6400)),
    (2048, (512, 1024, 0, 2048)),
]
LONG_K = 2
CPU_LAYER: Layer = (1024, (256, 0))
# Tokens that fill tiles of every size and leave some of each over.
FORCED_TOKENS = (8, 176, 512)
CHOSEN_TOKENS = (1, 16, 64, 128, 176, 256, 512, 1024)


@dataclass(frozen=True)
class Repeated:
    """A weight [times * n, k] of scales 1 whose first n rows come over and over."""

    case: Problem
    times: int

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        small = self.case.weight.split
        widths = small.dense_width.tolist()
        split = staircase_split(self.times * small.n, small.k, widths, seed=small.k)
        return (
            self.case.packed.w_packed.repeat(self.times),
            tile_table(split).to(self.case.device),
        )

    @cached_property
    def fp8(self) -> Tensor:
        return round_fp8(self.case.plain).view(torch.uint8).repeat(self.times, 1)

    def ours(self, x: Tensor, config: str | None, fast_accum: bool) -> Tensor:
        n = self.times * self.case.weight.split.n
        one, ones = (torch.ones(size, device=self.case.device) for size in (1, n))
        return ops.hybrid_gemm(
            *(x, *self.packed, one, ones),
            n=n,
            k=x.shape[1],
            out_dtype=torch.float32,
            fast_accum=fast_accum,
            config=config,
        )

    def library(self, x: Tensor, fast_accum: bool) -> Tensor:
        """The same sums in float32 by torch's FP8 product (cuBLASLt on a GPU)."""
        one, w = torch.ones((), device=self.case.device), self.fp8.view(x.dtype)
        return torch._scaled_mm(
            x, w.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast_accum
        )


@lru_cache(maxsize=8)
def few_tiles(layer: Layer, device: str, positive: bool) -> Problem:
    """Random weights with scales 1, so that sums are compared before anything else rounds."""
    k, widths = layer
    n = TILE * len(widths)
    w = random_weight(staircase_split(n, k, widths, seed=k), seed=n)
    mask = 0x7F if positive else 0xFF
    ones = torch.ones(n)
    return Problem(HybridWeight(w.split, w.values & mask, w.indices, w.dense & mask, ones), device)


@lru_cache(maxsize=3)
def weight_of(layer: Layer, device: str, positive: bool, wide: bool) -> Repeated:
    tiles = (MANY_TILES if wide else MODEL_ROWS // TILE) if device == "cuda" else 2
    return Repeated(few_tiles(layer, device, positive), tiles // len(layer[1]))


@lru_cache(maxsize=64)
def activations(m: int, k: int, device: str, positive: bool) -> Tensor:
    x = torch.randn(m, k, generator=generator(m + k)) * 16
    return round_fp8(x.abs() if positive else x).to(device)


@lru_cache(maxsize=64)
def exact(layer: Layer, m: int, device: str, positive: bool) -> Tensor:
    """float64 [m, n] of the tiles that differ."""
    x = activations(m, layer[0], device, positive)
    return x.double() @ few_tiles(layer, device, positive).plain.double().t()


def tile_rms(out: Tensor, ref: Tensor) -> Tensor:
    """RMS error of every tile of 128 rows and up to 128 tokens over the RMS of ref there.

    Below 16 tokens a tile has too few values for a ratio to mean something: one for all of a kind.

    Args:
        out: [m, times * n]; ref: float64 [m, n].

    Returns:
        [token tiles, times, n / 128], or [1, 1, n / 128].
    """
    m, n = ref.shape
    error = (out.double().view(m, -1, n) - ref[:, None]).square().unflatten(2, (-1, TILE)).mean(3)
    power = ref.square().unflatten(1, (-1, TILE)).mean(2)
    if m < 16:
        return (error.mean((0, 1)) / power.mean(0)).sqrt()[None, None]
    pairs = zip(error.split(TILE), power.split(TILE), strict=True)
    return torch.stack([(e.mean(0) / p.mean(0)).sqrt() for e, p in pairs if len(e) >= 16])


@lru_cache(maxsize=256)
def library_rms(layer: Layer, m: int, device: str, wide: bool, fast_accum: bool) -> Tensor:
    x = activations(m, layer[0], device, False)
    out = weight_of(layer, device, False, wide).library(x, fast_accum)
    return tile_rms(out, exact(layer, m, device, False))


def sampling(values: int) -> float:
    """How far the ratio of two RMS over so many values strays by chance: five standard errors."""
    return 5 / values**0.5


def error_ratio(
    layer: Layer, m: int, device: str, wide: bool, config: str | None, fast_accum: bool
) -> tuple[float, str]:
    """The largest error of a tile over what is allowed there, and what to say about it."""
    x = activations(m, layer[0], device, False)
    out = weight_of(layer, device, False, wide).ours(x, config, fast_accum)
    mine = tile_rms(out, exact(layer, m, device, False))
    theirs = library_rms(layer, m, device, wide, fast_accum)
    # Float32 sums have errors of their own that no kernel can avoid.
    floor = 2.0**-24 * layer[0] ** 0.5
    rows = m % TILE if m % TILE >= 16 else min(m, TILE)  # of the smallest tile
    allowed = FACTOR * theirs * (1 + sampling(rows * TILE)) + floor
    ratio = float((mine / allowed).max())
    means = mine.mean((0, 1)), theirs.mean((0, 1))
    words = ", ".join(
        f"{a:.2e} / {b:.2e}" for a, b in zip(*(v.tolist() for v in means), strict=True)
    )
    return ratio, (
        f"{config}, k = {layer[0]}, m = {m}, fast_accum = {fast_accum}: {ratio:.3f} of what is "
        f"allowed; mean RMS of ours / cuBLASLt's by row tile: {words}"
    )


def check_errors(record_property, found: list[tuple[float, str]]) -> None:
    """Fails with every m that is too far off, not only the first."""
    record_property("error", max(found)[1])
    wrong = [words for ratio, words in found if not ratio <= 1]
    assert not wrong, "; ".join(wrong)


def layer_of(device: str, which: int) -> Layer:
    return LAYERS[which] if device == "cuda" else CPU_LAYER


@every_config  # varies first, so that a layer's weight is made once
@pytest.mark.parametrize("which", range(len(LAYERS)))
def test_error_of_every_configuration(record_property, device, config, which):
    layer = layer_of(device, which)
    tokens = FORCED_TOKENS if device == "cuda" else (16, 130)
    found = [error_ratio(layer, m, device, True, config, True) for m in tokens]
    check_errors(record_property, found)


@pytest.mark.parametrize("fast_accum", [True, False])
@pytest.mark.parametrize("which", range(len(LAYERS)))
@all_devices
def test_error_of_the_choice(record_property, device, which, fast_accum):
    """At a model's shapes; without fast accumulation, within cuBLASLt's without it."""
    layer = layer_of(device, which)
    tokens = CHOSEN_TOKENS if device == "cuda" else (1, 16)
    found = [error_ratio(layer, m, device, False, None, fast_accum) for m in tokens]
    check_errors(record_property, found)


@pytest.mark.gpu
def test_promotion_reduces_the_error():
    """fast_accum=False must do something: on long K its error is clearly the smaller one."""
    layer = LAYERS[LONG_K]
    m = 512  # tiles of up to 64 tokens promote always
    weight, x = weight_of(layer, "cuda", False, True), activations(m, layer[0], "cuda", False)
    ref = exact(layer, m, "cuda", False)
    fast, slow = (tile_rms(weight.ours(x, None, f), ref).mean() for f in (True, False))
    assert slow < 0.5 * fast, (slow, fast)


@pytest.mark.gpu
@pytest.mark.parametrize("large_at", [0, 64, 700, 1800])
def test_promotion_interval(record_property, large_at):
    """fast_accum=False promotes at least every 256 columns. Beside a product of 448 the tensor
    cores lose products of 2^-9, until the sum is begun anew."""
    k = 2048
    w = exact_weight(Split.uniform(TILE, k, 512), seed=1)
    w = HybridWeight(w.split, w.values & 0x7F, w.indices, w.dense & 0x7F, torch.ones(TILE))
    case = Problem(w.canonical(), "cuda")
    x = torch.full((1, k), 2.0**-9, device="cuda")
    x[:, large_at] = 448
    x = round_fp8(x)
    rows = case.plain[:, large_at] == 1
    assert rows.any()
    sums = (x.double() @ case.plain.double().t())[0, rows]
    once = Repeated(case, 1)

    def lost(out: Tensor) -> int:
        return int(((sums - out[0, rows].double()) * 2**9).max())

    mine = {m: lost(once.ours(x.expand(m, k), None, False)) for m in (1, 40, 200)}
    fast = lost(once.ours(x, None, True))
    theirs = [lost(once.library(x.expand(16, k).contiguous(), f)) for f in (False, True)]
    record_property("lost", f"ours {mine}, with fast_accum {fast}, cuBLASLt {theirs}")
    assert max(mine.values()) <= 256, mine


def drift(out: Tensor, ref: Tensor) -> Tensor:
    """[times, n / 128]: mean of the signed relative error over tokens and 128 rows, which is what
    truncation leaves."""
    m, n = ref.shape
    relative = (out.double().view(m, -1, n) - ref[:, None]) / ref[:, None]
    return relative.unflatten(2, (-1, TILE)).mean((0, 3)).abs()


@lru_cache(maxsize=64)
def library_drift(layer: Layer, m: int, device: str, wide: bool, fast_accum: bool) -> Tensor:
    x = activations(m, layer[0], device, True)
    out = weight_of(layer, device, True, wide).library(x, fast_accum)
    return drift(out, exact(layer, m, device, True))


def drift_ratio(
    m: int, device: str, wide: bool, config: str | None, fast_accum: bool
) -> tuple[float, str]:
    layer = layer_of(device, LONG_K)
    x = activations(m, layer[0], device, True)
    out = weight_of(layer, device, True, wide).ours(x, config, fast_accum)
    mine = drift(out, exact(layer, m, device, True))
    theirs = library_drift(layer, m, device, wide, fast_accum)
    # What is added pays for the float32 additions of partial sums.
    ratio = float((mine / (FACTOR * theirs + 2.0**-24 * layer[0] ** 0.5)).max())
    return ratio, (
        f"{config}, m = {m}, fast_accum = {fast_accum}: {ratio:.3f} of what is allowed; drift "
        f"{float(mine.max()):.3e}, cuBLASLt's {float(theirs.max()):.3e}"
    )


@every_config
def test_drift_over_long_k(record_property, device, config):
    """All products positive: an accumulator that truncates falls behind; not more than cuBLASLt's
    does."""
    tokens = FORCED_TOKENS if device == "cuda" else (8,)
    found = [drift_ratio(m, device, True, config, True) for m in tokens]
    check_errors(record_property, found)


@pytest.mark.parametrize("fast_accum", [True, False])
@all_devices
def test_drift_of_the_choice(record_property, device, fast_accum):
    tokens = (1, 16, 64, 176, 512) if device == "cuda" else (8,)
    found = [drift_ratio(m, device, False, None, fast_accum) for m in tokens]
    check_errors(record_property, found)


@lru_cache(maxsize=2)
def subnormal_problem(device: str) -> Problem:
    w = random_weight(Split.uniform(256, 512, 128), seed=7)
    tiny = HybridWeight(w.split, w.values & 0x87, w.indices, w.dense & 0x87, torch.ones(256))
    return Problem(tiny.canonical(), device)


@every_config
def test_subnormals_count(device, config):
    """Weights and activations that are e4m3 subnormals; hardware that flushed them gives zeros."""
    case = subnormal_problem(device)
    x = torch.randint(0, 2, (40, 512), generator=generator(1), dtype=torch.uint8).to(device)
    x = x.view(torch.float8_e4m3fn)  # 0 or 2^-9, so that sums below 2^13 of 2^-18 are exact
    out = case.run(x, torch.ones(1, device=device), config, out_dtype=torch.float32)
    assert (out != 0).sum() > out.numel() / 2
    check_bits(out, (x.double() @ case.plain.double().t()).float(), f"{config}: subnormals")
