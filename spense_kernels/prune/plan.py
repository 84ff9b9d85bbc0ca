# SPDX-License-Identifier: Apache-2.0
"""Widths of every tile and order of gate/up rows, before anything is pruned."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.curves import row_curves
from spense_kernels.prune.groups import Group
from spense_kernels.prune.hessian import shrunk
from spense_kernels.prune.order import Problem
from spense_kernels.prune.reorder import (
    gated_pairs,
    reader_order,
    sort_in_shards,
    value_heads,
)
from spense_kernels.prune.sensitivity import Gradients
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
        row_order: int64 [N] new order of the rows of a projection, by module name.
        column_order: int64 [K] new order of the columns of those that read them.
        row_weights: float32 [N] sensitivity in the new order, by module name; empty for none.
    """

    widths: dict[str, Tensor]
    row_order: dict[str, Tensor] = field(default_factory=dict)
    column_order: dict[str, Tensor] = field(default_factory=dict)
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


@dataclass
class Curvature:
    """What makes a projection's H of what was collected.

    Attributes:
        gradients: of the backward pass, or None for none.
        tokens: that the Hessians were summed over.
        config: settings.
    """

    gradients: Gradients | None
    tokens: int
    config: PruneConfig

    def of(self, group: Group, hessians: dict[str, Tensor], prefix: str, device):
        """float32 [K, K] of the group, or a list with one for each projection."""
        plain = hessians[group.name].to(device)
        if self.gradients is None:
            return shrunk(plain, self.config.shrinkage)
        found = [self._of_module(prefix + name, plain) for name in group.modules]
        return found if len(found) > 1 else found[0]

    def _of_module(self, name: str, plain: Tensor) -> Tensor:
        found, config = self.gradients, self.config
        if name not in found.norm_mean:  # outside the decoder layers
            return shrunk(plain, config.shrinkage)
        mean = found.norm_mean[name] if config.token_weighting == "norm" else 1.0
        out = plain / (mean * self.tokens)
        if config.gradient_share:
            out = out.lerp_(found.hessians[name].to(plain.device), config.gradient_share)
        if config.sinks:
            sinks = found.sinks[name].to(plain.device)
            out.addmm_(sinks.T, sinks)
        return shrunk(out, config.shrinkage)


def layer_curves(
    layers: list[nn.Module],
    groups: list[list[Group]],
    hessians: list[dict[str, Tensor]],
    curvature: Curvature,
    device,
    prefixes: list[str],
) -> list[dict[str, Tensor]]:
    """Row losses float64 [widths, N] of every projection, by name (see `row_curves`).

    Lists have an entry a layer; layers alike are worked on together.
    """
    config = curvature.config
    found: list[dict[str, Tensor]] = [{} for _ in layers]
    same: dict[tuple, list[tuple[int, Group, Problem]]] = {}
    for index, layer in enumerate(layers):
        for place, group in enumerate(groups[index]):
            weights = [layer.get_submodule(m).weight.detach().to(device) for m in group.modules]
            hessian = curvature.of(group, hessians[index], prefixes[index], device)
            shards = shards_of(group, config)
            name = prefixes[index] + group.name
            problem = Problem(name, weights, hessian, [], shards)
            key = (place, shards, isinstance(hessian, list), *(w.shape for w in weights))
            same.setdefault(key, []).append((index, group, problem))
    for members in same.values():
        problems = [problem for _, _, problem in members]
        allowed = width_list(config.shares, problems[0].k // problems[0].k_shards)
        generators = [seeded(config, problem.name) for problem in problems]
        curves = row_curves(problems, allowed, config, generators)
        for (index, group, problem), curve in zip(members, curves, strict=True):
            parts = curve.split([w.shape[0] for w in problem.weights], dim=1)
            found[index].update(zip(group.modules, parts, strict=True))
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
        plan = LayerPlan({})
        if config.sort_rows:
            losses = {
                name: sensitivity[prefixes[index] + name].double() * curve[0]
                for name, curve in curves[index].items()
            }
            _sort_rows(plan, layer, groups[index], losses, config)
        moved = plan.row_order
        for group in groups[index]:
            shards = shards_of(group, config)
            allowed = width_list(config.shares, group.k // shards)
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


def _sort_rows(plan: LayerPlan, layer, groups, losses: dict[str, Tensor], config) -> None:
    """Orders of a layer: gate and up by the sum of their losses, v inside every head."""
    shards = {g.name: shards_of(g, config) for g in groups}
    for pair in gated_pairs(layer, groups):
        order = sort_in_shards(losses[pair.gate] + losses[pair.up], shards.get(pair.down, 1))
        plan.row_order[pair.gate] = plan.row_order[pair.up] = plan.column_order[pair.down] = order
    for heads in value_heads(layer, groups):
        keys = losses[heads.value]
        order = sort_in_shards(keys, keys.shape[0] // heads.head_dim)
        plan.row_order[heads.value] = order
        columns = layer.get_submodule(heads.out).in_features
        plan.column_order[heads.out] = reader_order(order, columns, heads.head_dim)


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
