# SPDX-License-Identifier: Apache-2.0
"""Which input columns stay dense."""

from __future__ import annotations

from torch import nn

from spense_kernels.linear import SpenseLinear


def dense_columns(model: nn.Module, groups: list[list[str]]) -> list[dict]:
    """The dense columns of every pruned projection; those of a group share one order.

    Args:
        groups: full names of projections that share an input.

    Returns a record a group: `modules` (names), `k_shards`, `order` (a list a shard of the
    columns that are dense in some tile, the longest-lived last: a tile of dense width w keeps the
    last w dense) and `widths` (by name: the dense width of each 128-row tile, a shard).
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SpenseLinear)}
    found = []
    for names in groups:
        splits = {name: layers[name].split for name in names}
        first = next(iter(splits.values()))
        widest = max(max(split.widths) for split in splits.values())
        order = first.k_perm[:, first.shard_columns - widest :].long()
        starts = [i * first.shard_columns for i in range(first.k_shards)]
        found.append(
            {
                "modules": names,
                "k": first.k,
                "k_shards": first.k_shards,
                "order": [
                    (shard + start).tolist() for shard, start in zip(order, starts, strict=True)
                ],
                "widths": {name: split.widths for name, split in splits.items()},
            }
        )
    return found
