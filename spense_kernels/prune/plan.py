# SPDX-License-Identifier: Apache-2.0
"""Widths of every tile and order of gate/up rows, before anything is pruned."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spense_kernels.prune.compress import Problem, row_curves
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.groups import Group
from spense_kernels.prune.reorder import GatedPair, gated_pairs, sort_in_shards
from spense_kernels.prune.widths import (
    TILE_ROWS,
    TileCosts,
    allocate,
    round_width,
    tile_sums,
    width_list,
)


@dataclass
class LayerPlan:
    """What to do with one decoder layer.

    Attributes:
        widths: int64 [ceil(N / 128)] dense columns of a shard a tile, by module name.
        row_order: int64 [N] new order of the rows of gate and up, by the name of gate.
        row_weights: float32 [N] sensitivity in the new order, by module name; empty for none.
    """

    widths: dict[str, Tensor]
    row_order: dict[str, Tensor] = field(default_factory=dict)
    row_weights: dict[str, Tensor] = field(default_factory=dict)


def shards_of(group: Group, config: PruneConfig) -> int:
    """K shards of a group: the setting for row-parallel projections whose K divides, else 1."""
    named = len(group.modules) == 1 and group.name.endswith(config.shard_modules)
    return config.k_shards if named and group.k % (16 * config.k_shards) == 0 else 1


def seeded(config: PruneConfig, name: str) -> torch.Generator:
    """CPU generator for one group, the same whether or not a run was resumed."""
    return torch.Generator().manual_seed((config.seed << 32) + zlib.crc32(name.encode()))


def uniform_plan(layer: nn.Module, groups: list[Group], config: PruneConfig) -> LayerPlan:
    """The same share of every matrix."""
    widths = {}
    for group in groups:
        width = round_width(config.dense_fraction, group.k // shards_of(group, config))
        for name in group.modules:
            tiles = -(-layer.get_submodule(name).out_features // TILE_ROWS)
            widths[name] = torch.full((tiles,), width, dtype=torch.int64)
    return LayerPlan(widths)


def layer_curves(
    layer: nn.Module,
    groups: list[Group],
    hessians: dict[str, Tensor],
    config: PruneConfig,
    device,
    prefix: str,
) -> dict[str, Tensor]:
    """Row losses float64 [widths, N] of every projection, by name (see `row_curves`)."""
    found = {}
    for group in groups:
        weights = [layer.get_submodule(m).weight.detach().to(device) for m in group.modules]
        shards = shards_of(group, config)
        hessian = hessians[group.name].to(device)
        problem = Problem(prefix + group.name, weights, hessian, [], shards)
        allowed = width_list(config.widths, group.k // shards)
        curves = row_curves(problem, allowed, config, seeded(config, prefix + group.name))
        parts = curves.split([w.shape[0] for w in weights], dim=1)
        found.update({m: part.cpu() for m, part in zip(group.modules, parts, strict=True)})
    return found


def staircase_plans(
    layers: list[nn.Module],
    groups: list[list[Group]],
    curves: list[dict[str, Tensor]],
    sensitivity: dict[str, Tensor],
    prefixes: list[str],
    config: PruneConfig,
) -> list[LayerPlan]:
    """Plans of all layers: rows sorted, then one width a tile under one budget.

    Args:
        curves: of each layer, by module name, float64 [widths, N].
        sensitivity: float32 [N] by full module name.
        prefixes: of the layers' full names.
    """
    plans, tables, places = [], [], []
    for index, layer in enumerate(layers):
        orders = {}
        if config.sort_rows:
            orders = _row_orders(layer, groups[index], curves[index], sensitivity, prefixes[index],
                                 config)  # fmt: skip
        plan = LayerPlan({}, {pair.gate: order for pair, order in orders.items()})
        moved = {name: order for p, order in orders.items() for name in (p.gate, p.up)}
        for group in groups[index]:
            shards = shards_of(group, config)
            allowed = width_list(config.widths, group.k // shards)
            for name in group.modules:
                weight = sensitivity[prefixes[index] + name].double()
                cost = curves[index][name] * weight
                if name in moved:
                    cost, weight = cost[:, moved[name]], weight[moved[name]]
                plan.row_weights[name] = weight.float()
                tables.append(_table(cost, allowed, shards))
                places.append((index, name, allowed, group.name, cost.shape[1] * group.k))
        plans.append(plan)
    chosen = _spend(tables, places, config)
    for (index, name, allowed, _, _), choice in zip(places, chosen, strict=True):
        plans[index].widths[name] = torch.tensor(allowed)[choice]
    return plans


def _row_orders(
    layer, groups, curves, sensitivity, prefix: str, config: PruneConfig
) -> dict[GatedPair, Tensor]:
    down_shards = {g.name: shards_of(g, config) for g in groups}
    orders = {}
    for pair in gated_pairs(layer, groups):
        keys = sum(sensitivity[prefix + m].double() * curves[m][0] for m in (pair.gate, pair.up))
        orders[pair] = sort_in_shards(keys, down_shards.get(pair.down, 1))
    return orders


def _table(cost: Tensor, allowed: list[int], shards: int) -> TileCosts:
    rows = tile_sums(torch.ones(cost.shape[1], dtype=torch.float64))
    width = torch.tensor(allowed, dtype=torch.float64) * shards
    # A wider block cannot lose more: guards the choice against noise in the curves.
    return TileCosts(tile_sums(cost).cummin(dim=0).values, width[:, None] * rows)


def _spend(tables, places, config: PruneConfig) -> list[Tensor]:
    if config.budget == "model":
        total = sum(size for *_, size in places)
        return allocate(tables, config.dense_fraction * total)
    chosen: list = [None] * len(tables)
    keys = [(index, group) for index, _, _, group, _ in places]
    for key in dict.fromkeys(keys):
        members = [i for i, k in enumerate(keys) if k == key]
        budget = config.dense_fraction * sum(places[i][-1] for i in members)
        picked = allocate([tables[i] for i in members], budget)
        for i, choice in zip(members, picked, strict=True):
            chosen[i] = choice
    return chosen
