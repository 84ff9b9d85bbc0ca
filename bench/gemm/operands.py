# SPDX-License-Identifier: Apache-2.0
"""Random operands made on the device itself. Times need legal contents, not a true weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spense_kernels.format import Split
from spense_kernels.format.tile_stream import tile_table
from spense_kernels.layout import LEGAL_NIBBLES, SPARSE_UNIT_BYTES, VALUE_BYTES, padded_k

REUSE_OVER_L2 = 5  # bytes of weights between two reads of the same one, in sizes of the L2
CPU_REUSE_BYTES = 1 << 20  # where only the logic is tried
FP8_RMS = 100.0577  # of all finite e4m3


def reuse_bytes(device: torch.device) -> int:
    """Bytes that the copies of a weight fill together, so that no cache holds one until its
    next turn."""
    if device.type == "cpu":
        return CPU_REUSE_BYTES
    return REUSE_OVER_L2 * torch.cuda.get_device_properties(device).L2_cache_size


def copy_count(weight_bytes: int, device: torch.device) -> int:
    return max(1, math.ceil(reuse_bytes(device) / weight_bytes))


def random_fp8(*shape: int, device: torch.device) -> Tensor:
    """uint8: every byte that is not a NaN of e4m3 is as likely as any other."""
    values = torch.randint(0, 254, shape, dtype=torch.uint8, device=device)
    return values.add_(values >= 0x7F)


def unit_scale(kept: int) -> float:
    """The scale of a weight of random_fp8, `kept` of them a row, that makes products of the size of
    its input."""
    return 1 / (FP8_RMS * math.sqrt(kept))


def random_x(m: int, k: int, device: torch.device) -> Tensor:
    """float8_e4m3fn [m, k] on rows of padded length, as quantize_fp8 returns it."""
    rows = torch.zeros(m, padded_k(k), dtype=torch.uint8, device=device)
    rows[:, :k] = random_fp8(m, k, device=device)
    return rows[:, :k].view(torch.float8_e4m3fn)


def two_of_four(n: int, k: int, device: torch.device) -> Tensor:
    """float8_e4m3fn [n, k] with two random places of every four zero."""
    keep = torch.zeros(len(LEGAL_NIBBLES), 4, dtype=torch.uint8)
    for row, nibble in enumerate(LEGAL_NIBBLES):
        keep[row, [nibble & 3, nibble >> 2]] = 1
    pick = torch.randint(len(LEGAL_NIBBLES), (n, k // 4), device=device)
    weight = random_fp8(n, k, device=device)
    weight.mul_(keep.to(device)[pick].view(n, k))
    return weight.view(torch.float8_e4m3fn)


def tile_stream(split: Split, device: torch.device) -> Tensor:
    """uint8 [split.packed_bytes]: a stream with random values and random legal metadata.

    Args:
        split: the same dense width in every tile.
    """
    (sparse, _), *others = split.tile_units()
    if any(units[0] != sparse for units in others):
        raise ValueError("tile_stream: expected one dense width, got several")
    stream = random_fp8(split.packed_bytes, device=device)
    if sparse:
        pairs = [low | high << 4 for low in LEGAL_NIBBLES for high in LEGAL_NIBBLES]
        legal = torch.tensor(pairs, dtype=torch.uint8, device=device)
        units = stream.view(split.tiles, -1)[:, : sparse * SPARSE_UNIT_BYTES]
        metadata = units.unflatten(1, (sparse, SPARSE_UNIT_BYTES))[..., VALUE_BYTES:]
        metadata.copy_(legal[torch.randint(len(legal), metadata.shape, device=device)])
    return stream


def tiles_of(split: Split, device: torch.device) -> Tensor:
    return tile_table(split).to(device)


def copies(weight: Tensor, device: torch.device, count: int | None = None) -> list[Tensor]:
    """The weight and clones, `count` in all, or as many as rotating past the caches needs."""
    count = count or copy_count(weight.nbytes, device)
    return [weight] + [weight.clone() for _ in range(count - 1)]
