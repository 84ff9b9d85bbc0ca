# SPDX-License-Identifier: Apache-2.0
"""The ceilings: a kernel that only moves the bytes (copy_stream.cu), and the arithmetic floor."""

from __future__ import annotations

from functools import partial

import torch

from gemm.copy_stream import RINGS, copy_stream
from gemm.operands import random_fp8
from gemm.rivals import Spense
from gemm.shapes import Layer
from gemm.timing import Call, Recorder
from spense_kernels.format import Split
from spense_kernels.layout import DENSE_UNIT_COLUMNS, SPARSE_UNIT_COLUMNS

# What tensor cores do with data in shared memory, measured (m64n256, e4m3; dense FLOP count).
DENSE_FLOPS = 1650e12
SPARSE_FLOPS = 2880e12
# Large bulk reads, measured; a device that is not listed is measured in the run.
READ_BYTES_PER_SECOND = {"NVIDIA H100 80GB HBM3": 3.1e12}


class Copy:
    """Reads the packed weight and x, writes as many bytes as y has."""

    def __init__(self, spense: Spense, ring: str):
        self.spense, self.ring = spense, RINGS[ring]

    def calls(self, m: int) -> list[Call]:
        layer, device = self.spense.layer, self.spense.device
        # Whole 16-byte words; at most 15 bytes less than the problem has.
        x = random_fp8(m * layer.k // 16 * 16, device=device)
        y = torch.empty(m * layer.n * 2 // 16 * 16, dtype=torch.uint8, device=device)
        return [partial(copy_stream, self.ring, w, x, y) for w in self.spense.streams]


def read_rate(recorder: Recorder) -> float:
    """Bytes a second of the copy kernel over 2 GiB, the better ring."""
    big = torch.zeros(2 << 30, dtype=torch.uint8, device=recorder.device)
    none = big[:0]
    recordings = {
        name: recorder.record([partial(copy_stream, ring, big, none, none)] * 2, passes=2)
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
