# SPDX-License-Identifier: Apache-2.0
"""Order of the K columns: dense ones last, and groups of four that lose little to 2:4."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

_PAIR = list(combinations(range(8), 2))
_PAIR_INDEX = {pair: i for i, pair in enumerate(_PAIR)}
# The 35 ways to cut eight columns into two groups of four; the first leaves things as they are.
_SPLITS = [(0, *rest) for rest in combinations(range(1, 8), 3)]
_GPU_ELEMENTS = 1 << 28  # of all pairs in work at a time
_QUADS = [
    (quad, tuple(c for c in range(8) if c not in quad)) for quad in _SPLITS
]  # fmt: skip


def snake(columns: Tensor) -> Tensor:
    """Deal columns, given from the most to the least important, into groups of four.

    The list is cut in four equal runs; group m takes the m-th of the first and third run and the
    m-th from the end of the second and fourth, so that every group mixes strong and weak columns.
    A remainder of up to three columns stays at the end.
    """
    quarter = columns.shape[0] // 4
    runs = columns[: 4 * quarter].view(4, quarter)
    dealt = torch.stack([runs[0], runs[1].flip(0), runs[2], runs[3].flip(0)], dim=1)
    return torch.cat([dealt.reshape(-1), columns[4 * quarter :]])


def retained(saliency: Tensor) -> Tensor:
    """Sum of the two largest saliencies of every group of four: [..., K] -> scalar (float64).

    The columns of a short last group are left out.
    """
    k = saliency.shape[-1] // 4 * 4
    return saliency[..., :k].unflatten(-1, (-1, 4)).topk(2, dim=-1).values.double().sum()


def search(
    saliencies: list[Tensor],
    segments: list[list[tuple[int, int]]],
    rounds: int,
    generators: list[torch.Generator],
) -> list[Tensor]:
    """Local search for groups that retain more saliency, in several matrices at a time.

    Every round pairs the groups of each segment at random, all pairs at once; each pair takes the
    best of the 35 ways to divide its eight columns (its present one when none is better).

    Args:
        saliencies: float32 [N, K] each, one shape, columns in their present order, zero where a row
            is dense.
        segments: (first, last) column ranges that groups may not leave; each starts on a group.
        rounds: how many.
        generators: CPU generators, one a matrix.

    Returns int64 [K] each: the new order as indices into the present one.
    """
    columns = torch.cat([saliency.T for saliency in saliencies])
    device, k = columns.device, saliencies[0].shape[1]
    order = torch.arange(len(columns), device=device)
    groups, pairs, count = [], [], 0
    for i, (of_one, generator) in enumerate(zip(segments, generators, strict=True)):
        own, spans = _groups(of_one)
        if spans:
            drawn = [_random_pairs(spans, generator) for _ in range(rounds)]
            pairs += [torch.stack(drawn) + count] if rounds else []
        groups.append(own + i * k)
        count += len(own)
    groups = torch.cat(groups).to(device)
    if pairs:
        before = groups.flatten().clone()
        best_of = torch.tensor([[*a, *b] for a, b in _QUADS], device=device)
        for drawn in torch.cat(pairs, dim=1).to(device):
            eight = groups[drawn].flatten(1)
            best = split_values(columns, eight).argmax(dim=0)
            groups[drawn] = eight.gather(1, best_of[best]).view(-1, 2, 4)
        order[before] = groups.flatten()
    offsets = torch.arange(len(saliencies), device=device)[:, None] * k
    return list(order.view(-1, k) - offsets)


def split_values(columns: Tensor, eight: Tensor) -> Tensor:
    """Retained saliency of the 35 splits of every eight columns.

    Args:
        columns: float32 [K, N].
        eight: int64 [P, 8] column numbers.

    Returns float32 [35, P].
    """
    size = eight.shape[0]
    if columns.is_cuda:
        size = max(1, _GPU_ELEMENTS // (2 * len(_PAIR) * columns.shape[1]))
    return torch.cat([_values(columns, part) for part in eight.split(max(1, size))], dim=1)


def _values(columns: Tensor, eight: Tensor) -> Tensor:
    """One group after another, so that caches hold what is in work."""
    data = columns[eight.T]
    larger = [torch.maximum(data[i], data[j]) for i, j in _PAIR]
    total = [data[i] + data[j] for i, j in _PAIR]
    ones = torch.ones(columns.shape[1], device=columns.device)
    values = torch.empty(len(_QUADS), 2, eight.shape[0], device=columns.device)
    buffer = torch.empty_like(data[0])
    other = torch.empty_like(buffer)
    for of_split, quads in zip(values, _QUADS, strict=True):
        for value, (a, b, c, d) in zip(of_split, quads, strict=True):
            # The two largest of four lie across the pairs (the larger of each) or in one of them.
            ab, cd = _PAIR_INDEX[a, b], _PAIR_INDEX[c, d]
            torch.add(larger[ab], larger[cd], out=buffer)
            torch.maximum(total[ab], total[cd], out=other)
            torch.mv(torch.maximum(buffer, other, out=buffer), ones, out=value)
    return values.sum(dim=1)


def _groups(segments) -> tuple[Tensor, list[tuple[int, int]]]:
    """Columns of all groups [G, 4], and the ranges of groups that may exchange columns."""
    parts, spans, count = [], [], 0
    for first, last in segments:
        size = (last - first) // 4
        parts.append(torch.arange(first, first + 4 * size).view(size, 4))
        if size >= 2:
            spans.append((count, count + size))
        count += size
    return torch.cat(parts) if parts else torch.empty(0, 4, dtype=torch.int64), spans


def _random_pairs(spans, generator: torch.Generator) -> Tensor:
    pairs = []
    for first, last in spans:
        shuffled = torch.randperm(last - first, generator=generator) + first
        pairs.append(shuffled[: (last - first) // 2 * 2].view(-1, 2))
    return torch.cat(pairs)
