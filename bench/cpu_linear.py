# SPDX-License-Identifier: Apache-2.0
"""Hybrid layers on the CPU against torch.nn.functional.linear in bfloat16, same threads, same run.

    python bench/cpu_linear.py                        # prints a table, writes bench/results
    python bench/cpu_linear.py --shapes 8192x8192 --tokens 1,4 --threads 2
    python bench/cpu_linear.py --cpu-time --json one_thread.json

Each round times every competitor once, in turn, so that a slow phase of the machine hits all of
them. Weights rotate over copies that together exceed the last-level cache several times. Ratios are
quotients of medians:

    gemm    hybrid_gemm alone, x already in FP8
    layer   quantize_fp8 with its gather, then hybrid_gemm: what SpenseLinear.forward does
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F

from spense_kernels import __version__, env, ops
from spense_kernels.format import Split
from spense_kernels.testing.op_inputs import random_payload

RESULTS = Path(__file__).resolve().parent / "results" / "cpu_linear.json"

# (n, k): square ones beyond the caches, then the projections of Gemma-3-270m.
SHAPES = [(8192, 8192), (16384, 8192), (2048, 640), (1024, 640), (640, 1024), (640, 2048)]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
DENSE_FRACTION = 0.25
POOL_BYTES = 256 << 20  # of each competitor's weights; several times the last-level cache
SECONDS = 4.0  # of one line of the table
MIN_ROUNDS, MAX_ROUNDS = 7, 200


@dataclass(frozen=True)
class Competitors:
    """Calls that take a round's number; it picks the copy of the weights."""

    linear: Callable[[int], torch.Tensor]
    gemm: Callable[[int], torch.Tensor]
    layer: Callable[[int], torch.Tensor]
    packed_bytes: int
    dense_fraction: float
    copies: tuple[int, int]

    def calls(self) -> dict[str, Callable[[int], torch.Tensor]]:
        return {"linear": self.linear, "gemm": self.gemm, "layer": self.layer}


class Weights:
    """A random bf16 weight and a random hybrid one of a shape, in copies that exceed the caches."""

    def __init__(self, n: int, k: int, dense_fraction: float = DENSE_FRACTION):
        self.n, self.k = n, k
        self.split = Split.from_fraction(n, k, dense_fraction)
        payload = random_payload(n, k, self.split.widths)
        packed, self.tiles = ops.pack(*payload, self.split.widths, n=n, k=k)
        self.packed = _copies(packed)
        self.bf16 = _copies(torch.randn(n, k, dtype=torch.bfloat16))
        self.w_scale = torch.rand(n)
        self.gather = torch.randperm(k, dtype=torch.int32)

    def competitors(self, m: int, config: str | None = None) -> Competitors:
        x = torch.randn(m, self.k, dtype=torch.bfloat16)
        x8, x_scale = ops.quantize_fp8(x, self.gather)

        def gemm(i: int, x8=x8, x_scale=x_scale) -> torch.Tensor:
            packed = self.packed[i % len(self.packed)]
            args = (x8, packed, self.tiles, x_scale, self.w_scale)
            return ops.hybrid_gemm(*args, n=self.n, k=self.k, config=config)

        return Competitors(
            linear=lambda i: F.linear(x, self.bf16[i % len(self.bf16)]),
            gemm=gemm,
            # Not the copy that `gemm` has just read.
            layer=lambda i: gemm(i + len(self.packed) // 2, *ops.quantize_fp8(x, self.gather)),
            packed_bytes=self.packed[0].numel(),
            dense_fraction=self.split.dense_fraction,
            copies=(len(self.bf16), len(self.packed)),
        )


def _copies(weight: torch.Tensor) -> list[torch.Tensor]:
    wanted = max(2, math.ceil(POOL_BYTES / weight.nbytes))
    return [weight] + [weight.clone() for _ in range(wanted - 1)]


def measure(
    rivals: Competitors, seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
) -> dict:
    """Medians in seconds, quartiles and ratios of one table line."""
    times: dict[str, list[float]] = {name: [] for name in rivals.calls()}
    end = None
    for i in count(-1):  # the first round warms up and does not count
        for name, call in rivals.calls().items():
            start = clock()
            call(max(i, 0))
            if i >= 0:
                times[name].append(clock() - start)
        end = end or time.perf_counter() + seconds
        late = time.perf_counter() > end
        if i + 1 >= MAX_ROUNDS or (late and i + 1 >= MIN_ROUNDS):
            break
    median = {name: statistics.median(series) for name, series in times.items()}
    spread = {
        name: (statistics.quantiles(series)[2] - statistics.quantiles(series)[0]) / median[name]
        for name, series in times.items()
    }
    return {
        "rounds": len(times["linear"]),
        "seconds": median,
        "quartile_spread": spread,
        "seconds_best": {name: min(series) for name, series in times.items()},
        "ratio_gemm": median["linear"] / median["gemm"],
        "ratio_layer": median["linear"] / median["layer"],
    }


HEADER = (
    f"{'n x k':>13} {'M':>4} | {'linear us':>10} {'gemm us':>10} {'layer us':>10} | "
    f"{'x gemm':>7} {'x layer':>7} | {'GB/s':>6} {'GMAC/s':>7} | rounds"
)


def line(n: int, k: int, m: int, rivals: Competitors, result: dict) -> str:
    """One aligned line; GB/s counts packed bytes, GMAC/s every weight, pruned ones too."""
    us = {name: f"{value * 1e6:10.1f}" for name, value in result["seconds"].items()}
    gemm = result["seconds"]["gemm"]
    return (
        f"{f'{n} x {k}':>13} {m:>4} | {us['linear']} {us['gemm']} {us['layer']} | "
        f"{result['ratio_gemm']:7.2f} {result['ratio_layer']:7.2f} | "
        f"{rivals.packed_bytes / gemm / 1e9:6.1f} {n * k * m / gemm / 1e9:7.1f} | "
        f"{result['rounds']}"
    )


def machine() -> dict:
    """What a reader needs to place the figures."""
    wanted = ("cpu family", "model", "stepping", "cache size")
    facts: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.is_file():
        pairs = (row.split(":", 1) for row in info.read_text().splitlines() if ":" in row)
        facts = {key.strip(): value.strip() for key, value in pairs}
    flags = sorted(
        f for f in facts.get("flags", "").split() if f.startswith(("avx", "amx", "f16c"))
    )
    return {
        "cpu": env.cpu_name(),
        **{name.replace(" ", "_"): facts[name] for name in wanted if name in facts},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": sorted(flags),
        "configs": env.cpu_configs(),
        "load_average": os.getloadavg()[0],  # other work; 0 on a machine fit for measuring
        "system": platform.platform(),
    }


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=RESULTS.parent.parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def pairs(text: str) -> list[tuple[int, int]]:
    return [tuple(int(size) for size in shape.split("x")) for shape in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=pairs, default=SHAPES, help="n x k, as 8192x8192,640x640")
    parser.add_argument(
        "--tokens", type=lambda t: [int(m) for m in t.split(",")], default=TOKENS, help="as 1,4,128"
    )
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    parser.add_argument("--config", help="force a configuration of hybrid_gemm")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one line")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time of one thread: holds on a busy machine, but knows nothing of threads",
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where to write the result")
    args = parser.parse_args()
    if args.cpu_time:
        args.threads = 1
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.thread_time if args.cpu_time else time.perf_counter

    report = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "versions": {
            "spense_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": machine(),
        "config": args.config or (env.cpu_configs() or ["unknown"])[0],
        "clock": "CPU time of one thread" if args.cpu_time else "wall",
        "dense_fraction": DENSE_FRACTION,
        "results": [],
    }
    print(f"{report['machine']['cpu']}, {torch.get_num_threads()} threads, {report['config']}")
    if report["machine"]["load_average"] > 0.5:
        print(f"busy: load average {report['machine']['load_average']:.1f}, not figures to quote")
    print(HEADER)
    for n, k in args.shapes:
        weights = Weights(n, k)
        for m in args.tokens:
            rivals = weights.competitors(m, args.config)
            result = measure(rivals, args.seconds, clock)
            print(line(n, k, m, rivals, result), flush=True)
            facts = {"n": n, "k": k, "m": m, "dense_fraction": rivals.dense_fraction}
            facts |= {"packed_bytes": rivals.packed_bytes, "weight_copies": rivals.copies}
            report["results"].append(facts | result)
        del weights
    report["machine"]["load_average_end"] = os.getloadavg()[0]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
