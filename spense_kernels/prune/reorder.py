# SPDX-License-Identifier: Apache-2.0
"""Weight-space symmetries: orders of rows that cost nothing at run time.

Rows of gate and up may be put in any order, both alike, when down's columns follow: the product
act(gate x) * (up x) is taken element by element.
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
