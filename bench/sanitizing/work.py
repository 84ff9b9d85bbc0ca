# SPDX-License-Identifier: Apache-2.0
"""What sanitize.py's tools watch: each configuration and each other kernel, on tiny problems.

Operands are made and compared on the CPU, so that little but our kernels runs on the GPU; every
tensor is an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING), so that a step beyond it is one
beyond memory.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from gemm.choices import token_tile
from torch import Tensor

from spense_kernels import ops
from spense_kernels.format import HybridWeight
from spense_kernels.testing.configs import gemm_configs
from spense_kernels.testing.generators import (
    exact_activations,
    exact_weight,
    random_activations,
    random_split,
)
from spense_kernels.testing.numeric import assert_bitwise
from spense_kernels.testing.reference import hybrid_gemm_plain

# Ragged everywhere, tiles of unequal units, few enough of them that stream-K cuts every one.
SHAPE = 300, 1100
BEYOND = 5  # tokens above a configuration's tile, so that it has two of them
QUANTIZED = [(1, 4096), (20, 1100), (30, 130), (2, 60000)]


@cache
def weight_of(n: int, k: int):
    return exact_weight(random_split(n, k, seed=n), seed=k, bias=True)


@cache
def weight_on(n: int, k: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stream, table, scale and bias on the device."""
    weight, packed = weight_of(n, k), weight_of(n, k).pack()
    tensors = packed.w_packed, packed.w_tiles, weight.w_scale, weight.bias
    return tuple(t.to(device) for t in tensors)


@cache
def product(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, its scale and what comes out, on the CPU."""
    n, k = SHAPE
    x, scale = exact_activations(m, k, seed=m)
    return x, scale, hybrid_gemm_plain(x, scale, weight_of(n, k)) + 0.0


def products(config: str | None, device: str, fast_accum: bool = True) -> None:
    """Two launches, so that the second finds what the first leaves: several tiles of tokens,
    one token."""
    n, k = SHAPE
    packed, tiles, w_scale, bias = weight_on(n, k, device)
    for m in ((token_tile(config or "") or 16) + BEYOND, 1):
        x, x_scale, wanted = product(m)
        y = ops.hybrid_gemm(
            *(x.to(device), packed, tiles, x_scale.to(device), w_scale, bias),
            n=n,
            k=k,
            config=config,
            fast_accum=fast_accum,
        )
        assert_bitwise(y.cpu() + 0.0, wanted)


def quantisers(device: str) -> None:
    for m, k in QUANTIZED:
        for dtype in (torch.bfloat16, torch.float32):
            x = random_activations(m, k, dtype=dtype)
            gather = torch.randperm(k, dtype=torch.int32)
            for order in (None, gather):
                got = ops.quantize_fp8(x.to(device), None if order is None else order.to(device))
                for a, b in zip(got, ops.quantize_fp8(x, order), strict=True):
                    assert_bitwise(a.cpu(), b)


def neighbours(device: str) -> None:
    """Norms and activations; their values are tested elsewhere, to a bound."""
    for m, k in QUANTIZED[:3]:
        a, b = (random_activations(m, k, seed=s).to(device) for s in (0, 1))
        weight = torch.rand(k, dtype=a.dtype).to(device)
        order = torch.randperm(k, dtype=torch.int32).to(device)
        for gather in (None, order):
            results = [
                ops.rms_norm_quantize(a, weight, gather, eps=1e-6),
                ops.add_rms_norm_quantize(a, b, weight, gather, eps=1e-6),
                ops.silu_mul_quantize(a, b, gather),
                ops.gelu_mul_quantize(a, b, gather),
            ]
            for _, scale, *_ in results:
                assert scale.cpu().isfinite().all()


def packers(device: str) -> None:
    for n, k, shards in [(300, 1100, 1), (200, 1024, 4)]:
        weight = exact_weight(random_split(n, k, shards, seed=k), seed=n)
        there = weight.to(device)
        packed = there.pack()
        assert_bitwise(packed.w_packed.cpu(), weight.pack().w_packed)
        assert HybridWeight.from_packed(packed, weight.split, there.w_scale).to("cpu").equal(weight)


def control(library: Path, device: str) -> None:
    """The kernel of control.cu, in which nothing is wrong."""
    chunks = 16
    words = torch.randint(0, 1 << 20, (chunks, 4, 32), dtype=torch.int32)
    from_, sums = words.to(device), torch.zeros(32, dtype=torch.int32).to(device)
    code = ctypes.CDLL(str(library)).racecheck_control_launch(
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        *(ctypes.c_void_p(t.data_ptr()) for t in (from_, sums)),
        chunks,
    )
    assert code == 0, f"CUDA error {code}"
    assert_bitwise(sums.cpu(), words.sum((0, 1), dtype=torch.int32))


def jobs(configs: list[str], device: str, library: Path | None) -> dict[str, Callable[[], None]]:
    names = gemm_configs(device) if configs == ["all"] else configs
    found: dict[str, Callable[[], None]] = {}
    if library is not None:
        found["control"] = partial(control, library, device)
    found |= {name: partial(products, name, device) for name in names}
    found["fast_accum=False"] = partial(products, None, device, fast_accum=False)
    others = {"pack": packers, "quantize_fp8": quantisers, "neighbours": neighbours}
    return found | {name: partial(job, device) for name, job in others.items()}


def work(configs: list[str], device: str, library: Path | None) -> int:
    """Runs every job and says which were right; how many were not. `library` is the control's."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # four tools share the cores
    todo, wrong = jobs(configs, device, library), 0
    print(f"  jobs: {len(todo)}", flush=True)
    for name, job in todo.items():
        start = time.perf_counter()
        try:
            job()
        except Exception as problem:  # whatever it is, the other kernels are watched too
            wrong += 1
            print(f"  {name}: WRONG, {type(problem).__name__}: {problem!s:.500}", flush=True)
        else:
            print(f"  {name}: right, {time.perf_counter() - start:.1f} s", flush=True)
    print("  all done", flush=True)
    return wrong
