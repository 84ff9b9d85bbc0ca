# SPDX-License-Identifier: Apache-2.0
"""The copy kernel of copy_stream.cu: what else moves as many bytes is held against it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from gemm.nvcc import library

SOURCE = Path(__file__).with_name("copy_stream.cu")

# (CTAs a multiprocessor, bytes of a chunk, stages): the better of two rings is the ceiling.
RINGS = {"copy_1": (1, 20480, 10), "copy_2": (2, 20480, 5)}


def copy_stream(ring: tuple[int, int, int], w: Tensor, x: Tensor, y: Tensor) -> None:
    """Launches the kernel on the current stream: reads w, then x, and writes all of y.

    Args:
        ring: one of RINGS.
        w, x: uint8, on one CUDA device, of a multiple of 16 bytes; x may be empty.
        y: likewise; what is written there means nothing.
    """
    ctas, chunk, stages = ring
    device = torch.cuda.get_device_properties(w.device)
    arrays = []
    for tensor in (w, x, y):
        arrays += [ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.numel())]
    code = library(SOURCE).copy_stream_launch(
        ctypes.c_void_p(torch.cuda.current_stream(w.device).cuda_stream),
        *(ctas * device.multi_processor_count, chunk, stages),
        *arrays,
    )
    if code:
        raise RuntimeError(f"copy_stream: CUDA error {code}")
