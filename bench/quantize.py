# SPDX-License-Identifier: Apache-2.0
"""quantize_fp8 and pack on a GPU: what the K gather costs, and what quantising adds to a GEMM.

    python bench/quantize.py                      # writes bench/results/quantize_<device>.json
    python bench/quantize.py --m 1,16,64 --layers qwen3-32b.down

gather   the kernel alone, back to back in one graph, with a random gather over without
added    a layer in one graph as [quantize_fp8, hybrid_gemm] minus [hybrid_gemm] alone, weights
         rotated past the L2; a launch of each follows the other as a programmatic dependent; the
         second figure is without a gather, as models run down, whose order gate and up write
pack     ops.pack of the largest layer, checks of its contents and tables included
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from gemm.ceiling import floor_us
from gemm.machine import add_commit, clocks, machine, short_name
from gemm.operands import copy_count, random_fp8
from gemm.rivals import Spense
from gemm.shapes import MODELS, Layer, parse_layers
from gemm.timing import Call, Recorder, rotation

from spense_kernels import ops
from spense_kernels.format import Split
from spense_kernels.layout import LEGAL_NIBBLES, padded_k

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192]
DENSE_FRACTION = 0.25
GRAPH_US = 800
GRAPH_LAUNCHES = 64
LARGEST = Layer("", "51200x5120", 51200, 5120)

HEADER = (
    f"{'layer':<20} {'M':>5} | {'no gather us':>12} {'gather us':>10} {'ratio':>6} {'GB/s':>6} | "
    f"{'gemm us':>8} {'with us':>8} {'added us':>8} {'in order':>8} | spread"
)


def quantise_calls(m: int, k: int, device: torch.device, gather: bool) -> list[Call]:
    """One call for each of so many inputs that together they exceed the L2; a few when small."""
    order = torch.randperm(k, dtype=torch.int32, device=device) if gather else None
    first = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    count = min(copy_count(first.nbytes, device), GRAPH_LAUNCHES)
    inputs = [first] + [first.clone() for _ in range(count - 1)]
    return [partial(ops.quantize_fp8, x, order) for x in inputs]


def chained(x: torch.Tensor, order: torch.Tensor | None, product, *rest, **kwargs) -> torch.Tensor:
    x8, x_scale = ops.quantize_fp8(x, order)
    return product(x8, *rest[:2], x_scale, *rest[2:], **kwargs)


def chain_calls(spense: Spense, m: int, gather: bool = True) -> list[Call]:
    """The calls of `spense.calls`, each behind a quantisation of its x."""
    k, device = spense.layer.k, spense.device
    order = torch.randperm(k, dtype=torch.int32, device=device) if gather else None
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    calls = []
    for call in spense.calls(m):
        _, stream, tiles, _, w_scale = call.args
        arguments = (x, order, call.func, stream, tiles, w_scale)
        calls.append(partial(chained, *arguments, **call.keywords))
    return calls


def measure(recorder: Recorder, spense: Spense, m: int, rate: float, seconds: float) -> dict:
    layer, device = spense.layer, recorder.device
    cuda = device.type == "cuda"
    calls = {
        "plain": quantise_calls(m, layer.k, device, gather=False),
        "gather": quantise_calls(m, layer.k, device, gather=True),
        "gemm": spense.calls(m),
        "chain": chain_calls(spense, m),
        "chain_in_order": chain_calls(spense, m, gather=False),
    }
    floor = floor_us(layer, spense.split, m, rate)
    launches = dict.fromkeys(("plain", "gather"), GRAPH_LAUNCHES if m <= 512 else 8)
    launches |= dict.fromkeys(("gemm", "chain", "chain_in_order"), round(GRAPH_US / floor))
    turns = {name: rotation(c, launches[name] if cuda else 1) for name, c in calls.items()}
    recordings = {name: recorder.record(c, len(c)) for name, c in turns.items()}
    times = recorder.measure(recordings, seconds)
    us = {name: summary["us"] for name, summary in times.items()}
    return {
        "layer": layer.label,
        "m": m,
        "k": layer.k,
        "gather_ratio": round(us["gather"] / us["plain"], 4),
        "bytes_per_second": round(m * (2 * layer.k + padded_k(layer.k)) / us["gather"] * 1e6),
        "added_us": round(us["chain"] - us["gemm"], 3),
        "added_in_order_us": round(us["chain_in_order"] - us["gemm"], 3),
        "times": times,
    }


def line(row: dict) -> str:
    us = {name: summary["us"] for name, summary in row["times"].items()}
    return (
        f"{row['layer']:<20} {row['m']:>5} | {us['plain']:>12.2f} {us['gather']:>10.2f} "
        f"{row['gather_ratio']:>6.3f} {row['bytes_per_second'] / 1e9:>6.0f} | {us['gemm']:>8.2f} "
        f"{us['chain']:>8.2f} {row['added_us']:>8.2f} {row['added_in_order_us']:>8.2f} | "
        f"{max(t['spread'] for t in row['times'].values()):.1%}"
    )


def pack_time(layer: Layer, device: torch.device, rounds: int = 7) -> dict:
    """Milliseconds of ops.pack from a random payload on the device, as a caller waits for them."""
    split = Split.from_fraction(layer.n, layer.k, DENSE_FRACTION)
    values, indices, dense = split.payload_bytes()
    pairs = [low | high << 4 for low in LEGAL_NIBBLES for high in LEGAL_NIBBLES]
    legal = torch.tensor(pairs, dtype=torch.uint8, device=device)
    payload = (
        random_fp8(values, device=device),
        legal[torch.randint(len(legal), (indices,), device=device)],
        random_fp8(dense, device=device),
    )
    times = []
    for _ in range(rounds + 1):
        _synchronize(device)
        start = time.perf_counter()
        ops.pack(*payload, split.widths, n=layer.n, k=layer.k)
        _synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    facts = {"n": layer.n, "k": layer.k, "packed_bytes": split.packed_bytes}
    return facts | {"ms": statistics.median(times[1:]), "first_ms": times[0]}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--m", type=lambda text: [int(m) for m in text.split(",")], default=TOKENS)
    add("--layers", nargs="+", default=[x.label for x in MODELS["qwen3-32b"]])
    add("--pack", nargs="+", default=[LARGEST.name], help="layers to pack, NxK")
    add("--seconds", type=float, default=0.25, help="replays of one line last about so long")
    add("--json", type=Path, help="default bench/results/quantize_<device>.json")
    add_commit(parser)
    add("--device", default="cuda", help="cpu tries the logic")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    recorder, run = Recorder(device), machine(device, args.commit)
    start = time.perf_counter()
    result = {"run": run, "rows": [], "pack": []}
    print(f"{run['device']['name']}, commit {run['commit']}\n{HEADER}", flush=True)
    for layer in (layer for layers in parse_layers(args.layers) for layer in layers):
        spense = Spense(layer, DENSE_FRACTION, device)
        for m in args.m:
            result["rows"].append(measure(recorder, spense, m, 3e12, args.seconds))
            print(line(result["rows"][-1]), flush=True)
    for layer in (layer for layers in parse_layers(args.pack) for layer in layers):
        result["pack"].append(pack_time(layer, device))
        packed = result["pack"][-1]
        print(f"pack {layer.label}: {packed['ms']:.2f} ms, first {packed['first_ms']:.1f} ms")
    run["clocks_end"] = clocks(device)
    path = args.json or RESULTS / f"quantize_{short_name(run['device']['name'], device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s; wrote {path}")


if __name__ == "__main__":
    main()
