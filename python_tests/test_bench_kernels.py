# SPDX-License-Identifier: Apache-2.0
"""Kernels of bench/decoding against plain torch: interpreted where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)


def attention_error(
    device: str, splits: int, tile: tuple, heads: int, kv_heads: int, dtype
) -> float:
    from decoding import split_kv
    from decoding.attention import widened

    size = (3, kv_heads, 256, 64)
    k, v = (torch.randn(size, device=device).to(BF16).to(dtype) for _ in range(2))
    q = torch.randn(3, heads, 1, 64, device=device).to(BF16)
    run = partial(split_kv.attend, splits, split_kv.Tile(*tile), q, k, v)
    got = run()
    # Whoever arrives last adds the parts, in the same order, and leaves the counters at zero.
    assert all(torch.equal(run(), got) for _ in range(1 if device == "cpu" else 20))
    assert splits == 1 or not split_kv._arrivals(q.device, 3 * kv_heads).any()
    wanted = widened(q.float(), k, v)
    return float((got.float() - wanted).norm() / wanted.norm())


def stored_errors(device: str, tokens: int, norms: bool, dtype) -> list[float]:
    """Of q, the keys and the values."""
    from decoding import kernels, step

    heads, kv_heads, dim, context, batch = 4, 2, 64, 24, 3
    qkv = torch.randn(batch * tokens, (heads + 2 * kv_heads) * dim, device=device).to(BF16)
    positions = torch.arange(context - tokens, context, device=device)
    angles = torch.randn(tokens, dim // 2, device=device)
    weight = torch.rand(2, dim, device=device).add(0.5).to(BF16) if norms else None
    results = []
    for function in (kernels.split_and_store, step.split_and_store):
        torch.manual_seed(1)
        caches = [
            torch.randn(batch, kv_heads, context, dim, device=device).to(BF16).to(dtype)
            for _ in range(2)
        ]
        q = function(qkv, angles.cos(), angles.sin(), weight, *caches, positions, heads, 1e-6)
        results.append([t.float() for t in (q, *caches)])
    return [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]


def all_errors(device: str) -> dict[str, float]:
    torch.manual_seed(0)
    found = {}
    for dtype in (BF16, FP8):
        for splits, heads, kv_heads in ((1, 16, 2), (1, 20, 2), (4, 20, 2), (8, 2, 2)):
            for tile in ((64, 4, 3), (128, 8, 2, True), (32, 2, 4)):  # some more than a split has
                name = f"attend {dtype} {splits} {tile} {heads}/{kv_heads}"
                found[name] = attention_error(device, splits, tile, heads, kv_heads, dtype)
        for tokens in (1, 5):
            for norms in (False, True):
                errors = stored_errors(device, tokens, norms, dtype)
                for name, error in zip("qkv", errors, strict=True):
                    found[f"store {dtype} {tokens} {norms} {name}"] = error
    return found


def check(found: dict[str, float]) -> None:
    """Weights and results of attention are rounded to bf16, and so is what is stored, or to FP8.
    The interpreter cuts off where a GPU rounds: errors up to 2^-8 and 2^-3, on average half of
    that, in FP8 of the places written alone. (A wrong place would give an error near 1.)"""
    assert len(found) == 2 * (12 + 12)
    for name, error in found.items():
        assert error < (2.0**-4 if "store torch.float8" in name else 2.0**-7), (name, error)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton")
def test_interpreted():
    code = "import json, test_bench_kernels as t; print(json.dumps(t.all_errors('cpu')))"
    paths = [ROOT, ROOT / "bench", ROOT / "python_tests", *sys.path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.gpu
def test_on_a_gpu():
    check(all_errors("cuda"))
