# SPDX-License-Identifier: Apache-2.0
"""The ceilings: a kernel that only moves the bytes (copy_stream.cu), and the arithmetic floor."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from gemm.operands import random_fp8
from gemm.rivals import Spense
from gemm.shapes import Layer
from gemm.timing import Call, Recorder
from spense_kernels.format import Split
from spense_kernels.layout import DENSE_UNIT_COLUMNS, SPARSE_UNIT_COLUMNS

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("copy_stream.cu")

# What tensor cores do with data in shared memory, measured (m64n256, e4m3; dense FLOP count).
DENSE_FLOPS = 1650e12
SPARSE_FLOPS = 2880e12
# Large bulk reads, measured; a device that is not listed is measured in the run.
READ_BYTES_PER_SECOND = {"NVIDIA H100 80GB HBM3": 3.1e12}

# (CTAs a multiprocessor, bytes of a chunk, stages): the better of two rings is the ceiling.
RINGS = {"copy_1": (1, 20480, 10), "copy_2": (2, 20480, 5)}


@cache
def _library() -> ctypes.CDLL:
    finder = [sys.executable, str(ROOT / "cmake" / "find_cuda.py"), "--nvcc"]
    nvcc = subprocess.run(finder, capture_output=True, text=True, check=True).stdout.strip()
    if not nvcc:
        raise RuntimeError("copy_stream.cu: expected an nvcc >= 12.8, got none")
    target = ROOT / ".cache" / "bench" / "copy_stream.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
    flags += ["-gencode=arch=compute_90a,code=sm_90a", "-o", str(target)]
    subprocess.run([nvcc, *flags, str(SOURCE)], check=True)
    return ctypes.CDLL(str(target))


def _launch(ring: tuple[int, int, int], w: Tensor, x: Tensor, y: Tensor) -> None:
    ctas, chunk, stages = ring
    device = torch.cuda.get_device_properties(w.device)
    arrays = []
    for tensor in (w, x, y):
        arrays += [ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.numel())]
    code = _library().copy_stream_launch(
        ctypes.c_void_p(torch.cuda.current_stream(w.device).cuda_stream),
        *(ctas * device.multi_processor_count, chunk, stages),
        *arrays,
    )
    if code:
        raise RuntimeError(f"copy_stream: CUDA error {code}")


class Copy:
    """Reads the packed weight and x, writes as many bytes as y has."""

    def __init__(self, spense: Spense, ring: str):
        self.spense, self.ring = spense, RINGS[ring]

    def calls(self, m: int) -> list[Call]:
        layer, device = self.spense.layer, self.spense.device
        # Whole 16-byte words; at most 15 bytes less than the problem has.
        x = random_fp8(m * layer.k // 16 * 16, device=device)
        y = torch.empty(m * layer.n * 2 // 16 * 16, dtype=torch.uint8, device=device)
        return [partial(_launch, self.ring, w, x, y) for w in self.spense.streams]


def read_rate(recorder: Recorder) -> float:
    """Bytes a second of the copy kernel over 2 GiB, the better ring."""
    big = torch.zeros(2 << 30, dtype=torch.uint8, device=recorder.device)
    none = big[:0]
    recordings = {
        name: recorder.record([partial(_launch, ring, big, none, none)] * 2, passes=2)
        for name, ring in RINGS.items()
    }
    times = recorder.measure(recordings, seconds=0)
    return big.numel() / min(t["us"] for t in times.values()) * 1e6


def bytes_moved(split: Split, m: int) -> int:
    """Packed weight, FP8 x and bf16 y, each once."""
    return split.packed_bytes + m * split.k + 2 * m * split.n


def floor_us(layer: Layer, split: Split, m: int, bytes_per_second: float) -> float:
    """No kernel of this format is faster: bytes at the read rate, or MMA time of its units."""
    sparse = SPARSE_UNIT_COLUMNS * sum(s for s, _ in split.tile_units()) / split.tiles
    dense = DENSE_UNIT_COLUMNS * sum(d for _, d in split.tile_units()) / split.tiles
    mma = 2 * m * layer.n * (sparse / SPARSE_FLOPS + dense / DENSE_FLOPS)
    return 1e6 * max(bytes_moved(split, m) / bytes_per_second, mma)
