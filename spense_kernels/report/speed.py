# SPDX-License-Identifier: Apache-2.0
"""Modelled decode speed of a model's projections, before and after pruning."""

from __future__ import annotations

from torch import nn

from spense_kernels.cost import Projection, Speed, fraction_for_speedup, speed_of
from spense_kernels.linear import SpenseLinear
from spense_kernels.prune import PruneConfig
from spense_kernels.prune.groups import decoder_layers, model_groups
from spense_kernels.prune.plan import shards_of


def group_names(model: nn.Module, skip: tuple[str, ...] = ()) -> list[list[str]]:
    """Full names of the projections that would be pruned, those that share an input together."""
    prefix, _ = decoder_layers(model)
    return [
        [f"{prefix}.{index}.{name}" for name in group.modules]
        for index, groups in enumerate(model_groups(model, skip))
        for group in groups
    ]


def projections(model: nn.Module, config: PruneConfig) -> list[list[Projection]]:
    """Shapes and K shards of what would be pruned, in the order of `group_names`."""
    _, layers = decoder_layers(model)
    return [
        [
            Projection(layer.get_submodule(name).out_features, group.k, shards_of(group, config))
            for name in group.modules
        ]
        for layer, groups in zip(layers, model_groups(model, config.skip), strict=True)
        for group in groups
    ]


def spend(model: nn.Module, config: PruneConfig, speedup: float, batch: int) -> PruneConfig:
    """The settings with the largest dense fraction whose modelled decode is fast enough.

    Raises UserError when none is.
    """
    found = fraction_for_speedup(projections(model, config), speedup, batch)
    return config.replace(dense_fraction=found.dense_fraction)


def planned_speed(model: nn.Module, config: PruneConfig, batch: int) -> Speed:
    """Modelled decode with the same share of every matrix dense."""
    shapes = projections(model, config)
    return speed_of([[p.split(config.dense_fraction) for p in group] for group in shapes], batch)


def speed_of_pruned(model: nn.Module, groups: list[list[str]], batch: int) -> Speed:
    """Modelled decode of a pruned model's SpenseLinear layers, named in `groups`."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, SpenseLinear)}
    return speed_of([[found[name].split for name in names] for names in groups], batch)
