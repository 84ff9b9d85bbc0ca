# SPDX-License-Identifier: Apache-2.0
"""Pruning without calibration data: the largest weights stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spense_kernels.errors import FormatError, PruneError
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.groups import Group, decoder_layers, model_groups
from spense_kernels.prune.install import PrunedModule, fp8_values, install
from spense_kernels.prune.mask import top2_mask
from spense_kernels.prune.order import rank_columns
from spense_kernels.prune.plan import shards_of, uniform_plan
from spense_kernels.prune.report import ModuleReport, PruneReport
from spense_kernels.quant import quantize_weight

MAGNITUDE = PruneConfig(method="magnitude", score="magnitude", permutation="snake")


@torch.no_grad()
def prune_magnitude(model: nn.Module, config: PruneConfig = MAGNITUDE) -> PruneReport:
    """Prune the projections of all decoder layers in place, looking at weights only.

    Projections that read the same input share one column order, as everywhere; which ones do is
    seen in one forward pass of two tokens. A quick start and a baseline: `prune_model` with a
    little text does far better.

    Args:
        model: causal LM whose decoder layers are made of nn.Linear, on any device or devices.
        config: its dense_fraction, k_shards, shard_modules, permutation ("snake" or "none") and
            skip count.

    The report's relative errors are those of the weights: |error|^2 / |weight|^2.

    Raises PruneError that names the projection for NaN or Inf in a weight.
    """
    prefix, layers = decoder_layers(model)
    report = PruneReport(config)
    for index, groups in enumerate(model_groups(model, config.skip)):
        layer, full = layers[index], f"{prefix}.{index}."
        widths = uniform_plan(layer, groups, config).widths
        modules: dict[str, PrunedModule] = {}
        for group in groups:
            modules.update(_prune_group(layer, full, group, widths, config))
        install(layer, modules)
        for name, pruned in modules.items():
            split, error = pruned.split, pruned.error
            report.modules.append(
                ModuleReport(
                    full + name, split.n, split.k, error, split.widths, split.k_shards,
                    split.dense_fraction, 0.0,
                )
            )  # fmt: skip
    return report


def _prune_group(
    layer: nn.Module, prefix: str, group: Group, widths: dict[str, Tensor], config: PruneConfig
) -> dict[str, PrunedModule]:
    linears = {name: layer.get_submodule(name) for name in group.modules}
    scores = sum(linear.weight.float().square().sum(dim=0) for linear in linears.values())
    shards = shards_of(group, config)
    size, width = group.k // shards, int(widths[group.name][0])
    if width == size:
        k_perm = torch.arange(size, dtype=torch.int32).repeat(shards, 1)
    else:
        k_perm = rank_columns(scores, [width], shards, config.permutation)
    order = k_perm.long() + torch.arange(shards, device=k_perm.device)[:, None] * size
    sparse = order[:, : size - width].reshape(-1).to(scores.device)
    pruned = {}
    for name, linear in linears.items():
        weight = linear.weight.float()
        kept = weight.clone()
        # A shard's last group may be short only when there is one shard.
        kept[:, sparse] *= top2_mask(weight[:, sparse].abs())
        try:
            codes, scale = quantize_weight(kept)
        except FormatError as fault:
            raise PruneError(f"prune_magnitude: {prefix}{name}: {fault}") from fault
        wrong = fp8_values(codes) * scale[:, None] - weight
        error = float(wrong.square().sum() / weight.square().sum().clamp_min(1e-30))
        bias = None if linear.bias is None else linear.bias.detach()
        pruned[name] = PrunedModule(
            codes, scale, bias, k_perm.cpu(), widths[name], error, 0.0, 0
        )  # fmt: skip
    return pruned
