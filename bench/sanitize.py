# SPDX-License-Identifier: Apache-2.0
"""Runs compute-sanitizer's tools over every kernel and configuration at small shapes.

    python bench/sanitize.py                             # memcheck, racecheck, synccheck, initcheck
    python bench/sanitize.py --json sanitize.json --budget-s 100
    python bench/sanitize.py --tools memcheck --configs t128x16_c1k1_s8x28

The tools run beside one another, a process each. Operands are made and compared on the CPU, so
that little but our kernels runs on the GPU; every tensor is an allocation of its own, so that a
step beyond it is one beyond memory. A tool is clean when it found nothing and every job was right.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

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
FIRST_PORT, PORTS = 49152, 200  # compute-sanitizer talks to what it watches; a range for each tool
# Ragged everywhere with tiles of unequal units; one row tile cut into many pieces.
SHAPES = [(300, 1100), (128, 4096)]
TOKENS = [1, 21, 150]
QUANTIZED = [(1, 4096), (20, 1100), (300, 130), (1100, 136), (2, 120000)]
RIGHT, KEPT_LINES = re.compile(r"^  (\S+): right", re.MULTILINE), 40


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
def product(n: int, k: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, its scale and what comes out, on the CPU."""
    x, scale = exact_activations(m, k, seed=m)
    return x, scale, hybrid_gemm_plain(x, scale, weight_of(n, k)) + 0.0


def products(config: str | None, device: str, fast_accum: bool = True) -> None:
    """Every shape and M, each with the weight of the other shape as the one that comes next."""
    for (n, k), (next_n, next_k) in zip(SHAPES, reversed(SHAPES), strict=True):
        packed, tiles, w_scale, bias = weight_on(n, k, device)
        following = weight_on(next_n, next_k, device)[:2]
        for m in TOKENS:
            x, x_scale, wanted = product(n, k, m)
            hint = following if m != TOKENS[1] else (None, None)
            y = ops.hybrid_gemm(
                *(x.to(device), packed, tiles, x_scale.to(device), w_scale, bias, *hint),
                n=n,
                k=k,
                next_k=next_k if hint[0] is not None else 0,
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
        assert packed.unpack(weight.split, there.w_scale).to("cpu").equal(weight)


def work(configs: list[str], device: str) -> None:
    """What the sanitizer watches; wrong results fail as its findings do."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # four tools share the cores
    names = gemm_configs(device) if configs == ["all"] else configs
    jobs = {name: lambda name=name: products(name, device) for name in names}
    jobs["fast_accum=False"] = lambda: products(None, device, fast_accum=False)
    jobs |= {"quantize_fp8": lambda: quantisers(device), "pack": lambda: packers(device)}
    jobs["neighbours"] = lambda: neighbours(device)
    for name, job in jobs.items():
        start = time.perf_counter()
        job()
        print(f"  {name}: right, {time.perf_counter() - start:.1f} s", flush=True)
    print("  all done", flush=True)


def sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(found):
        raise SystemExit("expected compute-sanitizer on PATH, got none")
    return found


class Watch:
    """This file's work under one tool, in a process group of its own."""

    def __init__(self, tool: str, args: argparse.Namespace, folder: Path):
        self.tool, self.start = tool, time.perf_counter()
        port = FIRST_PORT + PORTS * TOOLS.index(tool)
        command = [sanitizer(), "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        command += ["--port", str(port), "--launch-timeout", "60"]
        command += [*args.options.split(), sys.executable, __file__, "--work"]
        command += ["--configs", args.configs, "--device", args.device]
        print(f"{tool}: {' '.join(command)}", flush=True)
        self.file = folder / f"{tool}.txt"
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with self.file.open("w") as out:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, deadline: float) -> dict:
        """What the tool said; what has not ended at the deadline is killed."""
        code: int | str
        try:
            code = self.process.wait(max(0.1, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            code = "timeout"
        text = self.file.read_text(errors="replace")
        return {
            "clean": code == 0 and "  all done" in text,
            "exit": code,
            "seconds": round(time.perf_counter() - self.start, 1),
            "right": RIGHT.findall(text),
            "summary": re.findall(r"={3,} (\w* ?SUMMARY: .*)", text),
            "findings": [] if code == 0 else text.splitlines()[-KEPT_LINES:],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--configs", default="all", help="all, or names with commas between")
    parser.add_argument("--options", default="", help="more options of compute-sanitizer")
    parser.add_argument("--budget-s", type=float, default=540, help="seconds for all tools")
    parser.add_argument("--one-by-one", action="store_true", help="a tool at a time")
    parser.add_argument("--json", type=Path, help="where results go")
    parser.add_argument("--device", default="cuda", help="cpu tries the work itself")
    parser.add_argument("--work", action="store_true", help="only the work, not watched")
    args = parser.parse_args()
    if args.work:
        work(args.configs.split(","), args.device)
        return 0
    deadline, results = time.perf_counter() + args.budget_s, {}
    tools = args.tools.split(",")
    with tempfile.TemporaryDirectory() as folder:
        for group in [[tool] for tool in tools] if args.one_by_one else [tools]:
            for watch in [Watch(tool, args, Path(folder)) for tool in group]:
                found = results[watch.tool] = watch.finish(deadline)
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1) + "\n")
                print("\n".join(found["findings"]))
                verdict = "clean" if found["clean"] else f"NOT CLEAN ({found['exit']})"
                done = len(found["right"])
                print(
                    f"{watch.tool}: {verdict}, {done} jobs right, {found['seconds']} s", flush=True
                )
    return int(not all(found["clean"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
