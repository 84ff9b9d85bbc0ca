# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/sm100.md: what an SM100 launch needs and how long it may take.

`python bench/sm100_paper.py` rewrites the document, `--check` fails when it is out of date. A model
from published figures and from fractions of peak that an H100 reached; nothing was measured.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from spense_kernels import _C

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "sm100.md"
MULTIPROCESSORS = 148
DENSE_FRACTION = 0.25
TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)
# Qwen3-32B, tensor parallel 1: output rows x columns.
LAYERS = {
    "qkv": (10240, 5120),
    "o": (5120, 8192),
    "gate_up": (51200, 5120),
    "down": (5120, 25600),
}
MODEL_LAYERS = 64
# What of its peak an H100 gave: copies 3.13 of 3.35 TB/s, wgmma 1650 of 1979 and wgmma.sp 2880 of
# 3958 TFLOP/s. Taken over to the B200 for want of better.
DRAM_SHARE, DENSE_SHARE, SPARSE_SHARE = 0.93, 0.83, 0.73
LAUNCH_US = 1.0  # what a launch in a chain of dependent ones is taken to add


def packed_bytes(n: int, k: int, dense_fraction: float) -> int:
    """Of a layer whose tiles all have that logical dense fraction."""
    tiles, blocks = _C.format.tile_count(n), _C.format.padded_k(k) // 128
    sparse = _C.format.sparse_units(k - round(k * dense_fraction / 16) * 16)
    return tiles * _C.format.tile_bytes(sparse, blocks - 2 * sparse)


def sparse_share(n: int, k: int) -> float:
    """Of the units of a layer, all of which take the tensor cores the same time."""
    blocks = _C.format.padded_k(k) // 128
    sparse = _C.format.sparse_units(k - round(k * DENSE_FRACTION / 16) * 16)
    return sparse / (blocks - sparse)


def layer(n: int, k: int, m: int) -> dict:
    """Bounds and expected microseconds of ours and of dense FP8."""
    packed = packed_bytes(n, k, DENSE_FRACTION)
    config = _C.sm100.choose(m, n, k, packed, MULTIPROCESSORS)
    e = _C.sm100.estimate(config, m, n, k, packed, MULTIPROCESSORS)
    share = sparse_share(n, k)
    tensor = e["tensor_us"] * (share / SPARSE_SHARE + (1 - share) / DENSE_SHARE)
    bounds = {
        "memory": e["dram_us"] / DRAM_SHARE,
        "L2": e["l2_us"],
        "tensor": tensor,
        "smem": e["smem_us"],
    }
    machine = _C.sm100.MACHINE
    rate = machine["dram_bytes_per_us"] * DRAM_SHARE
    macs = machine["macs_per_clock"] * MULTIPROCESSORS * machine["clock_ghz"] * 1e3 * DENSE_SHARE
    dense = max((n * k + m * k + 2 * m * n) / rate, m * n * k / macs)
    bound = max(bounds, key=bounds.get)
    without_l2 = max(v for name, v in bounds.items() if name != "L2")
    return {
        "config": config,
        "packed": packed,
        "bounds": bounds,
        "bound": bound,
        "us": bounds[bound] + LAUNCH_US,
        "us_without_l2": without_l2 + LAUNCH_US,
        "dense_us": dense + LAUNCH_US,
        "ctas": e["ctas"],
    }


def budget_table() -> str:
    lines = [
        "| config | tokens x CTAs | shared memory, of | CTAs a multiprocessor | in flight: w + x | "
        "accumulators | tensor memory used, allocated |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in _C.sm100.configs():
        w = c["w_stages"] * 20480 * c["residency"] / 1024
        x = c["x_stages"] * c["tokens"] // c["ctas"] * 128 * c["residency"] / 1024
        lines.append(
            f"| {c['name']} | {c['tokens']} x {c['ctas']} | {c['smem_bytes'] / 1024:.0f}, "
            f"{c['smem_limit'] / 1024:.0f} KiB | {c['residency']} | {w:.0f} + {x:.0f} KiB | "
            f"{c['accumulators']} | {c['tmem_used']}, {c['tmem_columns']} columns |"
        )
    return "\n".join(lines)


def layer_table() -> str:
    lines = [
        "| layer | M | config | packed MB | memory | L2 | tensor | smem | bound by | expected | "
        "L2 left out | dense FP8 | speed-up | L2 left out |",
        "| --- |" + " --- |" * 13,
    ]
    for name, (n, k) in LAYERS.items():
        for m in TOKENS:
            r = layer(n, k, m)
            b = r["bounds"]
            lines.append(
                f"| {name} {n}x{k} | {m} | {r['config']} | {r['packed'] / 1e6:.1f} | "
                f"{b['memory']:.1f} | {b['L2']:.1f} | {b['tensor']:.1f} | {b['smem']:.1f} | "
                f"{r['bound']} | {r['us']:.1f} | {r['us_without_l2']:.1f} | {r['dense_us']:.1f} | "
                f"{r['dense_us'] / r['us']:.2f} | {r['dense_us'] / r['us_without_l2']:.2f} |"
            )
    return "\n".join(lines)


def total_table() -> str:
    lines = [
        "| M | all four, us | dense FP8, us | speed-up | L2 left out |",
        "| --- | --- | --- | --- | --- |",
    ]
    for m in TOKENS:
        rows = [layer(n, k, m) for n, k in LAYERS.values()]
        ours, free, dense = (
            sum(r[key] for r in rows) for key in ("us", "us_without_l2", "dense_us")
        )
        lines.append(
            f"| {m} | {ours:.1f} | {dense:.1f} | {dense / ours:.2f} | {dense / free:.2f} |"
        )
    return "\n".join(lines)


def decode_table(context: int = 2048) -> str:
    """A decode step: linear layers, lm_head and KV cache at the memory's rate, the rest fixed."""
    rate = _C.sm100.MACHINE["dram_bytes_per_us"] * DRAM_SHARE
    head = 151936 * 5120 * 2 / rate  # bf16 on both sides
    rest = MODEL_LAYERS * 8.0  # norms, rotary embedding, attention's latency, sampling
    lines = [
        "| M | linear layers, ms | KV cache, lm_head, rest, ms | dense FP8, ms | end to end |",
        "| --- | --- | --- | --- | --- |",
    ]
    for m in (1, 16, 64):
        rows = [layer(n, k, m) for n, k in LAYERS.values()]
        ours, dense = (MODEL_LAYERS * sum(r[key] for r in rows) for key in ("us", "dense_us"))
        kv = m * context * 2 * 8 * 128 * MODEL_LAYERS / rate  # FP8, 8 heads of 128
        other = head + rest + kv
        lines.append(
            f"| {m} | {ours / 1e3:.2f} | {other / 1e3:.2f} | {(dense + other) / 1e3:.2f} | "
            f"{(dense + other) / (ours + other):.2f} |"
        )
    return "\n".join(lines)


TABLES = {
    "budgets": budget_table,
    "layers": layer_table,
    "total": total_table,
    "decode": decode_table,
}


def filled(text: str) -> str:
    """The document with its tables written anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"{DOCUMENT}: expected one pair of <!-- {name} --> marks, got {count}")
    return text


def main(words: list[str]) -> int:
    text = DOCUMENT.read_text()
    new = filled(text)
    if words == ["--check"]:
        if text != new:
            print(f"{DOCUMENT} is out of date: python bench/sm100_paper.py")
        return int(text != new)
    DOCUMENT.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
