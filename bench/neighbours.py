# SPDX-License-Identifier: Apache-2.0
"""The ops before a GEMM (norms, gated activations, quantisation) against a copy of as many bytes.

    python bench/neighbours.py --out bench/results/neighbours.json

Inputs are bf16, the gather is a random order. A recording launches one op over and over on inputs
that are rotated past the L2, in one CUDA graph; the copy (gemm/copy_stream.cu) reads and writes the
same bytes in the same way. Up to 64 tokens also with inputs that are in L2, where the kernel ahead
leaves them in a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gemm.copy_stream import RINGS, copy_stream
from gemm.machine import add_commit, machine
from gemm.operands import reuse_bytes
from gemm.report import write_points
from gemm.timing import Recorder
from torch import Tensor

from spense_kernels import ops

EPS = 1e-6
BF16 = torch.bfloat16
HIDDEN, HEADS, INTERMEDIATE = 5120, 8192, 25600  # Qwen3-32B
TOKENS = [1, 4, 16, 64, 128, 512, 2048, 4096]
LAUNCHES = 24
FEW_TOKENS = 64


@dataclass(frozen=True)
class Op:
    """One op on rows of k columns; reads and writes are bytes an element."""

    name: str
    k: int
    reads: int
    writes: int
    run: Callable[[tuple[Tensor, ...], Tensor, Tensor], object]  # inputs, weight, gather
    inputs: int = 1


def _norm(x: tuple[Tensor, ...], weight: Tensor, gather: Tensor) -> object:
    return ops.rms_norm_quantize(*x, weight, gather, eps=EPS)


def _add_norm(x: tuple[Tensor, ...], weight: Tensor, gather: Tensor) -> object:
    return ops.add_rms_norm_quantize(*x, weight, gather, eps=EPS)


def _silu(x: tuple[Tensor, ...], weight: Tensor, gather: Tensor) -> object:
    return ops.silu_mul_quantize(*x, gather)


def _silu_in_order(x: tuple[Tensor, ...], weight: Tensor, gather: Tensor) -> object:
    return ops.silu_mul_quantize(*x)


def _gelu(approximate: str, x: tuple[Tensor, ...], weight: Tensor, gather: Tensor) -> object:
    return ops.gelu_mul_quantize(*x, gather, approximate=approximate)


def _quantize(x: tuple[Tensor, ...], weight: Tensor, gather: Tensor) -> object:
    return ops.quantize_fp8(*x, gather)


OPS = (
    Op("rms_norm_quantize", HIDDEN, 2, 1, _norm),
    Op("add_rms_norm_quantize", HIDDEN, 4, 3, _add_norm, inputs=2),
    Op("silu_mul_quantize", INTERMEDIATE, 4, 1, _silu, inputs=2),
    Op("silu_mul_quantize, in order", INTERMEDIATE, 4, 1, _silu_in_order, inputs=2),
    Op("gelu_mul_quantize, tanh", INTERMEDIATE, 4, 1, partial(_gelu, "tanh"), inputs=2),
    Op("gelu_mul_quantize, none", INTERMEDIATE, 4, 1, partial(_gelu, "none"), inputs=2),
    Op("quantize_fp8", HIDDEN, 2, 1, _quantize),
    Op("quantize_fp8", HEADS, 2, 1, _quantize),
)


def calls_of(op: Op, m: int, device: torch.device) -> list[Callable[[], object]]:
    """One call a set of inputs; together they read more than the caches hold."""
    count = max(1, min(LAUNCHES, -(-reuse_bytes(device) // (m * op.k * op.reads))))
    weight = torch.rand(op.k, device=device).to(BF16)
    gather = torch.randperm(op.k, dtype=torch.int32, device=device)
    made = []
    for _ in range(count):
        both = torch.randn(m, op.inputs * op.k, dtype=BF16, device=device)
        made.append(partial(op.run, both.split(op.k, dim=1), weight, gather))
    return made


def copies_of(op: Op, m: int, ring: str, device: torch.device) -> list[Callable[[], object]]:
    sizes = [m * op.k * each // 16 * 16 for each in (op.reads, op.writes)]
    count = max(1, min(LAUNCHES, -(-reuse_bytes(device) // sizes[0])))
    none = torch.empty(0, dtype=torch.uint8, device=device)
    made = []
    for _ in range(count):
        source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes)
        made.append(partial(copy_stream, RINGS[ring], source, none, target))
    return made


def measure(op: Op, m: int, recorder: Recorder) -> dict:
    calls = {"op": calls_of(op, m, recorder.device)}
    if recorder.device.type == "cuda":
        calls |= {ring: copies_of(op, m, ring, recorder.device) for ring in RINGS}
    if m <= FEW_TOKENS:
        calls["from_l2"] = calls["op"][:1]
    recordings = {}
    for name, some in calls.items():
        turns = -(-LAUNCHES // len(some))
        recordings[name] = recorder.record(some * turns, len(some) * turns)
    times = recorder.measure(recordings, seconds=0.05)
    copy = min((times[ring]["us"] for ring in RINGS if ring in times), default=None)
    us = times["op"]["us"]
    return {
        "op": op.name,
        "k": op.k,
        "m": m,
        "us": us,
        "spread": times["op"]["spread"],
        "from_l2_us": times["from_l2"]["us"] if m <= FEW_TOKENS else None,
        "copy_us": copy,
        "gb_per_s": round(m * op.k * (op.reads + op.writes) / us / 1e3, 1),
    }


def line(point: dict) -> str:
    copy = point["copy_us"]
    warm = "" if point["from_l2_us"] is None else f", {point['from_l2_us']:.2f} us from L2"
    share = "" if copy is None else f"{copy:8.2f} us copy {copy / point['us']:6.1%}"
    return (
        f"{point['op']:<28} {point['k']:>6} {point['m']:>5} | {point['us']:8.2f} us "
        f"{point['gb_per_s']:8.1f} GB/s {share}{warm}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    add_commit(parser)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    recorder = Recorder(torch.device(args.device))
    run = machine(recorder.device, args.commit)
    points = []
    with torch.inference_mode():
        for op in OPS:
            for m in args.tokens:
                points.append(measure(op, m, recorder))
                print(line(points[-1]), flush=True)
            if args.out:
                write_points(args.out, run, points)


if __name__ == "__main__":
    main()
