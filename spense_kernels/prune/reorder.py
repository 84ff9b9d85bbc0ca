# SPDX-License-Identifier: Apache-2.0
"""Weight-space symmetries: orders of rows that cost nothing at run time.

Rows of gate and up may be put in any order, both alike, when down's columns follow: the product
act(gate x) * (up x) is taken element by element. Rows of v may be put in any order inside a head
when the columns of o follow, in every query head that reads it: attention mixes tokens, not the
places of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spense_kernels.prune.groups import Group


@dataclass(frozen=True)
class GatedPair:
    """Names, inside a layer, of projections whose rows move alike, and of their reader."""

    gate: str
    up: str
    down: str


def gated_pairs(layer: nn.Module, groups: list[Group]) -> list[GatedPair]:
    """Gated MLPs of a layer: gate_proj and up_proj share an input, down_proj reads the product."""
    by_name = {name: group for group in groups for name in group.modules}
    found = []
    for name in by_name:
        if not name.endswith("gate_proj"):
            continue
        stem = name[: -len("gate_proj")]
        up, down = stem + "up_proj", stem + "down_proj"
        if up not in by_name or down not in by_name or by_name[up] is not by_name[name]:
            continue
        sizes = {layer.get_submodule(m).out_features for m in (name, up)}
        if sizes == {layer.get_submodule(down).in_features}:
            found.append(GatedPair(name, up, down))
    return found


def sort_in_shards(keys: Tensor, shards: int) -> Tensor:
    """Order by descending key inside each of `shards` equal parts: int64 [N]."""
    parts = keys.view(shards, -1)
    offset = torch.arange(shards, device=keys.device)[:, None] * parts.shape[1]
    return (parts.argsort(dim=1, descending=True, stable=True) + offset).reshape(-1)


@dataclass(frozen=True)
class ValueHeads:
    """Names, inside a layer, of the value projection and its reader, and the size of a head."""

    value: str
    out: str
    head_dim: int


def value_heads(layer: nn.Module, groups: list[Group]) -> list[ValueHeads]:
    """Attentions of a layer: v_proj and o_proj of one module that tells its head_dim."""
    names = {name for group in groups for name in group.modules}
    found = []
    for name in sorted(names):
        stem = name[: -len("v_proj")]
        out = stem + "o_proj"
        if not name.endswith("v_proj") or out not in names:
            continue
        size = getattr(layer.get_submodule(stem.rstrip(".")), "head_dim", None)
        rows = layer.get_submodule(name).out_features
        columns = layer.get_submodule(out).in_features
        if isinstance(size, int) and size > 0 and rows % size == 0 and columns % rows == 0:
            found.append(ValueHeads(name, out, size))
    return found


def reader_order(order: Tensor, columns: int, head_dim: int) -> Tensor:
    """Order of o's columns int64 [columns] that follows v's rows in `order`.

    Query head h reads value head h // (query heads / value heads).
    """
    inside = order.view(-1, head_dim) % head_dim  # value head -> places
    repeat = columns // order.shape[0]
    places = inside.repeat_interleave(repeat, dim=0)
    offset = torch.arange(places.shape[0], device=order.device)[:, None] * head_dim
    return (places + offset).reshape(-1)
