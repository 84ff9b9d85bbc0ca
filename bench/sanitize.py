# SPDX-License-Identifier: Apache-2.0
"""Runs compute-sanitizer's tools over every kernel and configuration at small shapes.

    python bench/sanitize.py                             # memcheck, racecheck, synccheck, initcheck
    python bench/sanitize.py --tools memcheck --configs t128x16_c1k1_s8x28

Operands are made and compared on the CPU, so that little but our kernels runs on the GPU; every
tensor is an allocation of its own, so that a step beyond it is one beyond memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time

import torch

from spense_kernels import ops
from spense_kernels.testing.configs import gemm_configs
from spense_kernels.testing.generators import (
    exact_activations,
    exact_weight,
    random_activations,
    random_split,
)
from spense_kernels.testing.numeric import assert_bitwise
from spense_kernels.testing.reference import hybrid_gemm_plain

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Ragged everywhere with tiles of unequal units; one row tile cut into many pieces.
SHAPES = [(300, 1100), (128, 4096)]
TOKENS = [1, 21, 150]
QUANTIZED = [(1, 4096), (20, 1100), (300, 130), (1100, 136), (2, 120000)]


def products(config: str | None, device: str, fast_accum: bool = True) -> None:
    for n, k in SHAPES:
        weight = exact_weight(random_split(n, k, seed=n), seed=k, bias=True)
        packed = weight.pack().w_packed.to(device), weight.pack().w_tiles.to(device)
        scale, bias = weight.w_scale.to(device), weight.bias.to(device)
        for m in TOKENS:
            x, x_scale = exact_activations(m, k, seed=m)
            y = ops.hybrid_gemm(
                *(x.to(device), *packed, x_scale.to(device), scale, bias),
                n=n,
                k=k,
                config=config,
                fast_accum=fast_accum,
            )
            assert_bitwise(y.cpu() + 0.0, hybrid_gemm_plain(x, x_scale, weight) + 0.0)


def quantisers(device: str) -> None:
    for m, k in QUANTIZED:
        for dtype in (torch.bfloat16, torch.float32):
            x = random_activations(m, k, dtype=dtype)
            gather = torch.randperm(k, dtype=torch.int32)
            for order in (None, gather):
                got = ops.quantize_fp8(x.to(device), None if order is None else order.to(device))
                for a, b in zip(got, ops.quantize_fp8(x, order), strict=True):
                    assert_bitwise(a.cpu(), b)


def packers(device: str) -> None:
    for n, k, shards in [(300, 1100, 1), (200, 1024, 4)]:
        weight = exact_weight(random_split(n, k, shards, seed=k), seed=n)
        there = weight.to(device)
        packed = there.pack()
        assert_bitwise(packed.w_packed.cpu(), weight.pack().w_packed)
        assert packed.unpack(weight.split, there.w_scale).to("cpu").equal(weight)


def work(configs: list[str], device: str) -> None:
    """What the sanitizer watches; wrong results fail as its findings do."""
    torch.manual_seed(0)
    names = gemm_configs(device) if configs == ["all"] else configs
    jobs = {"quantize_fp8": lambda: quantisers(device), "pack": lambda: packers(device)}
    jobs |= {name: lambda name=name: products(name, device) for name in names}
    jobs["fast_accum=False"] = lambda: products(None, device, fast_accum=False)
    for name, job in jobs.items():
        start = time.perf_counter()
        job()
        print(f"  {name}: right, {time.perf_counter() - start:.1f} s", flush=True)


def sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(found):
        raise SystemExit("expected compute-sanitizer on PATH, got none")
    return found


def watch(tool: str, args: argparse.Namespace) -> bool:
    """Runs this file's work under one tool; its report goes to the terminal."""
    command = [sanitizer(), "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    command += [*args.options.split(), sys.executable, __file__, "--work"]
    command += ["--configs", args.configs]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.perf_counter()
    print(f"{tool}: {' '.join(command)}", flush=True)
    try:
        code = subprocess.run(command, env=environment, timeout=args.timeout).returncode
    except subprocess.TimeoutExpired:
        code = "timeout"
    print(f"{tool}: {'clean' if code == 0 else code}, {time.perf_counter() - start:.0f} s")
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--configs", default="all", help="all, or names with commas between")
    parser.add_argument("--options", default="", help="more options of compute-sanitizer")
    parser.add_argument("--timeout", type=float, default=540, help="seconds for one tool")
    parser.add_argument("--device", default="cuda", help="cpu tries the work itself")
    parser.add_argument("--work", action="store_true", help="only the work, not watched")
    args = parser.parse_args()
    if args.work:
        work(args.configs.split(","), args.device)
        return 0
    results = {tool: watch(tool, args) for tool in args.tools.split(",")}
    print(", ".join(f"{tool} {'clean' if ok else 'NOT CLEAN'}" for tool, ok in results.items()))
    return int(not all(results.values()))


if __name__ == "__main__":
    sys.exit(main())
