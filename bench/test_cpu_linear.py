# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark entries of cpu_linear.py; a group holds what is to be compared.

python -m pytest bench/test_cpu_linear.py --benchmark-only --benchmark-group-by=group

The quotients in one run of cpu_linear.py are the figures to quote: it interleaves competitors.
Each entry carries them as `extra_info`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count

import pytest
from cpu_linear import Weights, measure

SHAPES = [(8192, 8192), (2048, 640), (640, 2048)]
TOKENS = [1, 4, 128, 512]


@lru_cache(maxsize=1)
def weights_of(n: int, k: int) -> Weights:
    return Weights(n, k)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("m", TOKENS, ids=lambda m: f"m{m}")
@pytest.mark.parametrize("what", ["linear", "gemm", "layer"])
def test_cpu_linear(benchmark, shape, m, what):
    rivals = weights_of(*shape).competitors(m)
    call, rounds = rivals.calls()[what], count()
    benchmark.group = f"{shape[0]} x {shape[1]}, M = {m}"
    if what == "layer":
        ratios = measure(rivals, seconds=1.0)
        benchmark.extra_info |= {name: ratios[name] for name in ("ratio_gemm", "ratio_layer")}
    benchmark.pedantic(
        call, setup=lambda: ((next(rounds),), {}), rounds=max(7, 200 // m), warmup_rounds=1
    )
