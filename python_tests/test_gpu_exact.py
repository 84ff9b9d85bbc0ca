# SPDX-License-Identifier: Apache-2.0
"""hybrid_gemm with every configuration of the GPU, bit for bit on integer-valued operands.

Fresh memory is poisoned in every call, so an output or a partial sum that nobody wrote shows.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from devices import (
    CPU_CONFIGS,
    GPU_CONFIGS,
    NO_GPU,
    Problem,
    all_devices,
    check_bits,
    every_config,
    poisoned,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spense_kernels.testing.generators import (
    AWKWARD_SHAPES,
    ROUND_SHAPES,
    exact_activations,
    exact_weight,
    legal_widths,
    random_split,
    staircase_split,
)

FLOAT32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Around every token tile: one below, whole, one above, and several tiles.
TOKENS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257]
MORE_TOKENS = [513, 1000]
CPU_TOKENS = [1, 9, 33]
# Few row tiles and long K (every tile cut several times), more row tiles than multiprocessors,
# ragged ends of both, rows that no cluster of 2 or 4 tiles fills.
LONG_SHAPES = [(128, 16384), (384, 8192), (520, 4100), (17000, 256), (1300, 1152), (2176, 1024)]


@cache
def problem(n: int, k: int, device: str, shards: int = 1) -> Problem:
    split = random_split(n, k, shards, seed=n + shards)
    return Problem(exact_weight(split, seed=k, bias=n % 2 == 0), device)


@cache
def staircase(n: int, k: int, widths: tuple[int, ...], device: str) -> Problem:
    return Problem(exact_weight(staircase_split(n, k, widths), seed=k, bias=True), device)


@cache
def activations(m: int, k: int, device: str) -> tuple[Tensor, Tensor]:
    x, x_scale = exact_activations(m, k, seed=m)
    return x.to(device), x_scale.to(device)


def check(case: Problem, m: int, config: str | None, dtypes=(FLOAT32,), **kwargs) -> None:
    split = case.weight.split
    x, x_scale = activations(m, split.k, case.device)
    for dtype in dtypes:
        with poisoned():
            out = case.run(x, x_scale, config, out_dtype=dtype, **kwargs)
        what = f"{config}: n = {split.n}, k = {split.k}, m = {m}, {dtype}"
        check_bits(out, case.exact(x, x_scale, dtype), what)


@all_devices
def test_fresh_memory_is_poisoned(device):
    with poisoned():
        assert torch.empty(5, 7, device=device).isnan().all()
        assert (torch.empty(9, dtype=torch.uint8, device=device) == 255).all()


@every_config
@pytest.mark.parametrize("shape", AWKWARD_SHAPES + ROUND_SHAPES, ids=str)
def test_every_token_count(device, config, shape):
    case = problem(*shape, device)
    for m in TOKENS if device == "cuda" else CPU_TOKENS:
        check(case, m, config, (FLOAT32, BF16, FP16))


@every_config
@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
def test_many_tiles_and_long_k(device, config, shape):
    case = problem(*shape if device == "cuda" else ROUND_SHAPES[0], device)
    for m in [*TOKENS, *MORE_TOKENS] if device == "cuda" else CPU_TOKENS:
        check(case, m, config, (FLOAT32, BF16) if m % 2 else (FLOAT32,))


@every_config
@pytest.mark.parametrize("token_tiles", [3, 6, 9])
def test_last_rounds(device, config, token_tiles):
    """A few tiles more than run at a time, which some configurations cut for several clusters."""
    case = problem(*(5757, 2320) if device == "cuda" else ROUND_SHAPES[0], device)
    tokens = int(config.split("_")[0].split("x")[1]) if device == "cuda" else 2
    check(case, token_tiles * tokens - 5, config, (FLOAT32, BF16))


@every_config
@pytest.mark.parametrize("shards", [2, 4])
def test_shards(device, config, shards):
    case = problem(300, 1024, device, shards)
    for m in (3, 40, 130):
        check(case, m, config)


@every_config
@pytest.mark.parametrize("k", [528, 1040])
def test_every_width_of_a_staircase(device, config, k):
    """One tile for every legal width: 0 %, 100 % and each boundary inside a unit."""
    # Every boundary inside a unit in the one, some of them behind several units in the other.
    widths = legal_widths(k)[:: (1 if k == 528 else 3) if device == "cuda" else 7]
    case = staircase(128 * len(widths), k, tuple(widths), device)
    for m in (1, 16, 33, 130, 257) if device == "cuda" else (5,):
        check(case, m, config)


@every_config
@pytest.mark.parametrize("dense", [0, 2048])
def test_all_sparse_and_all_dense(device, config, dense):
    case = staircase(640, 2048, (dense,), device)
    for m in TOKENS if device == "cuda" else CPU_TOKENS:
        check(case, m, config)


@every_config
def test_steep_staircases(device, config):
    """Neighbouring tiles from nothing dense to all dense, so that equal bytes are unequal units."""
    case = staircase(128 * 13 - 5, 2048, (0, 2048, 0, 16, 2032, 256, 1024), device)
    for m in (1, 8, 24, 64, 128, 300) if device == "cuda" else (3,):
        check(case, m, config, (FLOAT32, FP16))


@all_devices
@pytest.mark.parametrize("fast_accum", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (130, 130), (384, 1024), (520, 4100), (2176, 1024)])
def test_the_chosen_configuration(device, fast_accum, shape):
    case = problem(*shape, device)
    tokens = [*TOKENS, *MORE_TOKENS, 2049] if device == "cuda" else CPU_TOKENS
    for m in tokens:
        check(case, m, None, (FLOAT32, BF16, FP16), fast_accum=fast_accum)


@all_devices
@settings(max_examples=20 if NO_GPU else 150)
@given(data=st.data())
def test_any_shape(device, data):
    big = device == "cuda"
    n = data.draw(st.integers(1, 700 if big else 200), "n")
    k = data.draw(st.integers(1, 1500 if big else 400), "k")
    m = data.draw(st.integers(1, 600 if big else 20), "m")
    seed = data.draw(st.integers(0, 1 << 16), "seed")
    config = data.draw(st.sampled_from([None, *(GPU_CONFIGS if big else CPU_CONFIGS)]), "config")
    split = random_split(n, k, seed=seed)
    check(Problem(exact_weight(split, seed=seed, bias=seed % 2 == 0), device), m, config)


@all_devices
def test_one_scale_for_all_tokens(device):
    case = problem(384, 1024, device)
    x, _ = exact_activations(20, 1024, seed=3)
    scale = torch.tensor([0.5], device=device)
    x = x.to(device)
    out = case.run(x, scale, out_dtype=FLOAT32)
    check_bits(out, case.exact(x, scale.expand(20), FLOAT32), "per tensor")


@all_devices
def test_rows_with_nan_stay_rows_with_nan(device):
    case = problem(384, 1024, device)
    x, scale = (t.to(device) for t in exact_activations(70, 1024, seed=1))
    bad = x.view(torch.uint8).clone()
    bad[[3, 69], [0, 1023]] = 0x7F
    for config in (None, *([] if device == "cpu" else GPU_CONFIGS)):
        out = case.run(bad.view(x.dtype), scale, config, out_dtype=FLOAT32)
        rows = out.isnan().any(1).nonzero().flatten().tolist()
        assert rows == [3, 69], config
        keep = [i for i in range(70) if i not in rows]
        check_bits(out[keep], case.exact(x, scale, FLOAT32)[keep], f"{config} beside NaN")
