# SPDX-License-Identifier: Apache-2.0
"""2:4 groups on bytes: encode rows of FP8 weights to kept values and index nibbles, and back.

A nibble holds the places of the two kept values, idx0 | idx1 << 2, with idx0 < idx1. Two nibbles
share a byte, the even group in the low half. All functions work on any device and keep to uint8
arithmetic, because gathers with int64 indices would need eight times the memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spense_kernels.layout import EMPTY_NIBBLE, GROUP, groups_of

NEGATIVE_ZERO = 0x80


def drop_negative_zero(weight: Tensor) -> Tensor:
    """FP8 bytes with -0.0 (0x80) replaced by +0.0; a new tensor."""
    return weight.masked_fill(weight == NEGATIVE_ZERO, 0)


def nan_bytes(weight: Tensor) -> Tensor:
    """Where FP8 bytes are NaN (0x7F or 0xFF); bool, same shape."""
    return (weight & 0x7F) == 0x7F


def encode_groups(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical encoding of rows in which every 4 consecutive columns are a group.

    Args:
        block: uint8 [rows, S], no -0.0 bytes; a short last group is filled with zeros.

    Returns:
        values uint8 [rows, 2G], indices uint8 [rows, ceil(G / 2)] with G = ceil(S / 4), and
        crowded bool [rows, G]: groups with more than two nonzeros, whose encoding is wrong.
    """
    rows, columns = block.shape
    groups = groups_of(columns)
    x = F.pad(block, (0, groups * GROUP - columns)).view(rows, groups, GROUP)
    x0, x1, x2, x3 = x.unbind(-1)
    n0, n1, n2, n3 = (x != 0).to(torch.uint8).unbind(-1)
    # The last nonzero gives idx1, the first of two gives idx0. A single nonzero at place 0 is
    # idx0 and the empty idx1 = 1 follows it; elsewhere it is idx1 and the empty idx0 = 0 leads.
    last = torch.where(n3 > 0, 3, torch.where(n2 > 0, 2, 1)).to(torch.uint8)
    first = torch.where(n0 > 0, 0, torch.where(n1 > 0, 1, 2)).to(torch.uint8)
    count = n0 + n1 + n2 + n3
    first *= count > 1
    values = torch.empty(rows, groups, 2, dtype=torch.uint8, device=block.device)
    for slot, place in ((0, first), (1, last)):
        picked = x0 * (place == 0)
        for i, column in ((1, x1), (2, x2), (3, x3)):
            picked += column * (place == i)
        values[:, :, slot] = picked
    indices = pair_nibbles(first | (last << 2))
    return values.view(rows, 2 * groups), indices, count > 2


def pair_nibbles(nibbles: Tensor) -> Tensor:
    """uint8 [rows, G] -> uint8 [rows, ceil(G / 2)]; an odd end is filled with the empty nibble."""
    if nibbles.shape[1] % 2:
        nibbles = F.pad(nibbles, (0, 1), value=EMPTY_NIBBLE)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def split_nibbles(indices: Tensor, groups: int) -> Tensor:
    """uint8 [rows, ceil(G / 2)] -> uint8 [rows, G]."""
    both = torch.stack((indices & 0xF, indices >> 4), dim=-1)
    return both.view(indices.shape[0], -1)[:, :groups]


def decode_groups(values: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Rows of FP8 bytes, zeros at pruned places: the inverse of `encode_groups`.

    Args:
        values: uint8 [rows, 2G]; indices: uint8 [rows, ceil(G / 2)]; columns: S, G = ceil(S / 4).

    Returns:
        uint8 [rows, S]
    """
    rows, groups = values.shape[0], groups_of(columns)
    nibbles = split_nibbles(indices, groups)
    first, last = nibbles & 3, nibbles >> 2
    kept = values.reshape(rows, groups, 2)
    block = torch.empty(rows, groups, GROUP, dtype=torch.uint8, device=values.device)
    for i in range(GROUP):
        block[:, :, i] = kept[:, :, 0] * (first == i) + kept[:, :, 1] * (last == i)
    return block.view(rows, groups * GROUP)[:, :columns]


def illegal_indices(indices: Tensor) -> Tensor:
    """Where a byte holds a nibble without idx0 < idx1; bool, same shape."""
    low = (indices & 3) < ((indices >> 2) & 3)
    high = ((indices >> 4) & 3) < (indices >> 6)
    return ~(low & high)


def keep_largest_two(scores: Tensor) -> Tensor:
    """2:4 mask of rows: the two largest scores of every 4 consecutive columns.

    Args:
        scores: floating point [rows, S]; a short last group keeps two (or all) of its columns.

    Returns:
        bool [rows, S]; among equal scores the choice is torch.topk's.
    """
    rows, columns = scores.shape
    groups = groups_of(columns)
    padded = F.pad(scores, (0, groups * GROUP - columns), value=-torch.inf)
    best = padded.view(rows, groups, GROUP).topk(2, dim=-1).indices
    mask = torch.zeros(rows, groups, GROUP, dtype=torch.bool, device=scores.device)
    mask.scatter_(-1, best, True)
    return mask.view(rows, -1)[:, :columns]
