# SPDX-License-Identifier: Apache-2.0
"""Shapes, splits and operands for tests and benchmarks. Everything comes from a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spense_kernels.format import HybridWeight, Split
from spense_kernels.layout import GRANULE, GROUP, KEPT, tile_count
from spense_kernels.quant import round_fp8

# The SM90 FP8 accumulator keeps partial sums below this exactly, so exact tests stay under it.
EXACT_SUM = 1 << 13

# (n, k): tails in both directions, less than a tile, less than a unit, real projections.
AWKWARD_SHAPES = [(1, 1), (3, 3), (5, 100), (130, 130), (127, 256), (129, 257), (200, 384)]
ROUND_SHAPES = [(128, 256), (256, 640), (384, 1024), (512, 2048)]
TOKENS = [0, 1, 2, 4, 13, 16, 33, 257]


def generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


def legal_widths(shard_columns: int) -> list[int]:
    """Every dense width a tile may have in a shard of so many columns."""
    return sorted({*range(0, shard_columns, GRANULE), shard_columns})


def random_perm(k: int, k_shards: int = 1, seed: int = 0) -> Tensor:
    """int32 [k_shards, k / k_shards], a permutation in each shard."""
    g = generator(seed)
    rows = [torch.randperm(k // k_shards, generator=g) for _ in range(k_shards)]
    return torch.stack(rows).to(torch.int32)


def random_split(n: int, k: int, k_shards: int = 1, seed: int = 0) -> Split:
    """A random legal width for every tile and a random permutation."""
    legal = torch.tensor(legal_widths(k // k_shards), dtype=torch.int32)
    pick = torch.randint(len(legal), (tile_count(n),), generator=generator(seed + 1))
    return Split(n, k, random_perm(k, k_shards, seed), legal[pick])


def staircase_split(
    n: int, k: int, widths: Sequence[int], k_shards: int = 1, seed: int = 0
) -> Split:
    """The given widths in turn over the tiles, a random permutation."""
    width = torch.tensor([widths[t % len(widths)] for t in range(tile_count(n))])
    return Split(n, k, random_perm(k, k_shards, seed), width)


def two_of_four(weight: Tensor, split: Split, seed: int = 0) -> Tensor:
    """A copy of weight [n, k] with two random places of each sparse group set to zero."""
    g = generator(seed)
    weight, columns = weight.clone(), split.columns()
    for run in split.runs():
        sparse = columns[:, : split.shard_columns - run.width]
        rows = slice(run.first_row, run.last_row)
        for chosen in sparse:
            groups = -(-chosen.numel() // GROUP)
            rank = torch.rand(run.rows, groups, GROUP, generator=g).argsort(-1).argsort(-1)
            keep = (rank < KEPT).reshape(run.rows, -1)[:, : chosen.numel()]
            block = weight[rows][:, chosen]
            weight[rows, chosen] = torch.where(keep, block, torch.zeros_like(block))
    return weight


def random_weight(
    split: Split, seed: int = 0, bias: bool = False, negative_zeros: float = 0.0
) -> HybridWeight:
    """Normally distributed FP8 weights with random scales; canonical encoding.

    Args:
        negative_zeros: share of weights that are -0.0 before encoding.
    """
    return HybridWeight.from_dense(*_random_dense(split, seed, bias, negative_zeros))


def random_dense_weight(split: Split, seed: int = 0, negative_zeros: float = 0.0) -> Tensor:
    """FP8 bytes uint8 [n, k] that obey the split, as `HybridWeight.from_dense` takes them."""
    return _random_dense(split, seed, False, negative_zeros)[0]


def _random_dense(split: Split, seed: int, bias: bool, negative_zeros: float):
    g = generator(seed + 2)
    weight = round_fp8(torch.randn(split.n, split.k, generator=g)).view(torch.uint8)
    weight = two_of_four(weight, split, seed)
    weight[torch.rand(weight.shape, generator=g) < negative_zeros] = 0x80
    scale = torch.rand(split.n, generator=g) + 0.5
    return weight, scale, split, torch.randn(split.n, generator=g) if bias else None


def exact_weight(split: Split, seed: int = 0, bias: bool = False) -> HybridWeight:
    """Weights -1, 0, 1, scales that are powers of two, integer bias: every product is exact."""
    g = generator(seed + 3)
    signs = torch.randint(-1, 2, (split.n, split.k), generator=g).float()
    weight = two_of_four(round_fp8(signs).view(torch.uint8), split, seed)
    scale = torch.exp2(torch.randint(-2, 3, (split.n,), generator=g).float())
    offset = torch.randint(-8, 9, (split.n,), generator=g).float() if bias else None
    return HybridWeight.from_dense(weight, scale, split, offset)


def exact_activations(m: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """FP8 x [m, k] of small integers and scales that are powers of two, float32 [m].

    With weights of magnitude 1 no partial sum, in any order, reaches EXACT_SUM: the magnitude is
    at most min(8, (EXACT_SUM - 1) / k), and for longer k only so many places are not zero.
    """
    g = generator(seed + 4)
    most = max(1, min(8, (EXACT_SUM - 1) // k))
    x = torch.randint(-most, most + 1, (m, k), generator=g).float()
    if k * most >= EXACT_SUM:
        keep = torch.randperm(k, generator=g)[: EXACT_SUM - 1]
        mask = torch.zeros(k)
        mask[keep] = 1
        x *= mask
    scale = torch.exp2(torch.randint(-2, 3, (m,), generator=g).float())
    return round_fp8(x), scale


def random_activations(m: int, k: int, seed: int = 0, dtype=torch.bfloat16) -> Tensor:
    """Normal activations [m, k] with a few columns ten times as large, as models have them."""
    g = generator(seed + 5)
    x = torch.randn(m, k, generator=g)
    x[:, torch.randperm(k, generator=g)[: max(1, k // 100)]] *= 10
    return x.to(dtype)
