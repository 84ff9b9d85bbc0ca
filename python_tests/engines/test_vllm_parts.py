# SPDX-License-Identifier: Apache-2.0
"""What a tensor-parallel rank makes of the checkpoint's tensors; needs no vLLM."""

from __future__ import annotations

import pytest
import torch

from spense_kernels.checkpoint.config import ModuleEntry
from spense_kernels.errors import CheckpointError, FormatError
from spense_kernels.format import HybridWeight, Split
from spense_kernels.format.slices import join_rows
from spense_kernels.testing.generators import random_perm, random_weight
from spense_kernels.vllm.parts import LayerParts, Part, rows_of_rank, shards_of_rank


def weights(rows: list[int], k: int = 160, k_shards: int = 1, bias: bool = True):
    """Weights of these rows that share one k_perm and have different widths in every tile."""
    perm = random_perm(k, k_shards)
    made = []
    for i, n in enumerate(rows):
        tiles = -(-n // 128)
        width = torch.tensor([16 * ((t + i) % 3) for t in range(tiles)])
        made.append(random_weight(Split(n, k, perm, width), seed=i, bias=bias))
    return made


def parts_of(weight: HybridWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return weight.to_dense(), weight.w_scale, weight.bias


def dense_rows(pieces) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, scale and bias that join_rows must keep."""
    return (
        torch.cat([w.to_dense()[a:b] for w, a, b in pieces]),
        torch.cat([w.w_scale[a:b] for w, a, b in pieces]),
        torch.cat([w.bias[a:b] for w, a, b in pieces]),
    )


@pytest.mark.parametrize("k_shards", [1, 2])
@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 256), (0, 128), (128, 300)],  # on tiles
        [(0, 256), (0, 64), (64, 128)],  # heads of 64 rows
        [(64, 192), (100, 101), (7, 300)],
        [(0, 256), (0, 300), (0, 300)],
    ],
)
def test_joined_rows_are_the_rows(ranges, k_shards):
    pieces = [(w, *r) for w, r in zip(weights([256, 300, 300], 160, k_shards), ranges, strict=True)]
    if ranges[0] == (0, 256) and ranges[2] == (128, 300):
        tiles = [int(w) for p, a, b in pieces for w in p.split.dense_width[a // 128 : -(-b // 128)]]
    else:
        tiles = None
    joined = join_rows(pieces).validate()
    assert joined.split.n == sum(b - a for a, b in ranges)
    for got, wanted in zip(parts_of(joined), dense_rows(pieces), strict=True):
        assert torch.equal(got, wanted)
    if tiles is not None:
        assert joined.split.widths == tiles, "whole tiles stay as sparse as they were"


def test_joining_what_does_not_fit():
    a, b = weights([128, 128])
    other = weights([128], k=160)[0]
    other = HybridWeight.from_dense(
        other.to_dense(), other.w_scale, Split.uniform(128, 160, 160), other.bias
    )
    with pytest.raises(FormatError, match=r"pieces\[1\]: its k_perm differs"):
        join_rows([(a, 0, 128), (other, 0, 128)])
    with pytest.raises(FormatError, match=r"pieces\[1\]: expected 0 <= first < last <= 128"):
        join_rows([(a, 0, 128), (b, 64, 129)])
    with pytest.raises(FormatError, match="must not be empty"):
        join_rows([])
    bare = HybridWeight(b.split, b.values, b.indices, b.dense, b.w_scale)
    with pytest.raises(FormatError, match=r"pieces\[1\]: all or none must have a bias"):
        join_rows([(a, 0, 128), (bare, 0, 128)])


def qkv(rank: int = 0, ranks: int = 2):
    """(weights, LayerParts) of q, k, v with 256, 128, 128 rows on one of `ranks` ranks."""
    made = weights([256, 128, 128])
    parts = {}
    for shard_id, weight in zip("qkv", made, strict=True):
        entry = ModuleEntry(weight.split.n, weight.split.k, 1, True)
        name = f"model.{shard_id}_proj"
        parts[shard_id] = Part(
            name, entry, rows_of_rank(entry, name, weight.split.n // ranks, rank)
        )
    return made, LayerParts(parts)


def give(parts: LayerParts, made, leave: tuple[str, str] | None = None) -> None:
    for shard_id, weight in zip("qkv", made, strict=True):
        for short, tensor in weight.state_dict().items():
            if (shard_id, short) != leave:
                parts.add(short, shard_id, tensor)


def test_two_ranks_together_are_the_layer():
    halves = []
    for rank in range(2):
        made, parts = qkv(rank)
        give(parts, made)
        assert parts.missing() == []
        halves.append(parts.build().to_dense())
        assert parts.tensors == {}, "tensors are let go"
    for first, whole, size in ((0, made[0], 128), (128, made[1], 64), (192, made[2], 64)):
        both = torch.cat([half[first : first + size] for half in halves])
        assert torch.equal(both, whole.to_dense())


def test_k_shards_of_a_rank():
    weight = weights([200], k=128, k_shards=4)[0]
    entry = ModuleEntry(200, 128, 4, True)
    for rank in range(2):
        shards = shards_of_rank("down", 4, rank, 2)
        parts = LayerParts({None: Part("down", entry, (0, 200))}, shards)
        for short, tensor in weight.state_dict().items():
            parts.add(short, None, tensor)
        built = parts.build()
        assert built.equal(weight.shard(*shards))
        assert (built.bias is None) == (rank > 0)
    with pytest.raises(CheckpointError, match=r"expected one of \[1, 2, 4\], .* got 3"):
        shards_of_rank("down", 4, 0, 3)


def test_faults_are_named():
    made, parts = qkv()
    give(parts, made, leave=("k", "dense"))
    assert parts.missing() == ["model.k_proj.dense"]
    with pytest.raises(CheckpointError, match=r"model\.k_proj\.dense: missing tensor"):
        parts.build()
    with pytest.raises(CheckpointError, match=r"model\.q_proj\.bias: comes twice"):
        parts.add("bias", "q", made[0].bias)
    with pytest.raises(CheckpointError, match=r"values: expected a shard id of \['q', 'k', 'v'\]"):
        parts.add("values", None, made[0].values)
    with pytest.raises(
        CheckpointError, match=r"model\.k_proj\.dense: expected dtype .*float8_e4m3fn, got .*uint8"
    ):
        parts.add("dense", "k", made[1].dense)
    short = made[1].dense[:-1].view(torch.float8_e4m3fn)
    parts.add("dense", "k", short)
    with pytest.raises(CheckpointError, match=r"model\.k_proj\.dense: must have shape"):
        parts.build()


def test_rows_beyond_the_layer():
    with pytest.raises(CheckpointError, match=r"k_proj: vLLM expects at least 192 rows"):
        rows_of_rank(ModuleEntry(128, 64, 1, False), "k_proj", 64, 2)


def test_another_order_of_columns_in_one_part():
    made, parts = qkv()
    made[1] = random_weight(
        Split(128, 160, random_perm(160, seed=9), torch.tensor([16])), bias=True
    )
    give(parts, made)
    with pytest.raises(
        CheckpointError, match=r"model\.q_proj \+ model\.k_proj \+ .*its k_perm differs"
    ):
        parts.build()
