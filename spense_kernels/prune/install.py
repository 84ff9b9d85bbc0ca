# SPDX-License-Identifier: Apache-2.0
"""Put pruned projections into a model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spense_kernels.format import HybridWeight, Split
from spense_kernels.linear import SpenseLinear


@dataclass
class PrunedModule:
    """One pruned projection, columns in their original order.

    Attributes:
        weight: uint8 [N, K] FP8 bytes, or float [N, K] without FP8; zero where pruned.
        scale: float32 [N], or None without FP8.
        bias: [N] or None; rows in the order of weight.
        k_perm: int32 [k_shards, K / k_shards].
        dense_width: int64 [ceil(N / 128)].
        error, damping, dead_inputs, refit_damping: see ModuleReport.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    k_perm: Tensor
    dense_width: Tensor
    error: float
    damping: float
    dead_inputs: int
    refit_damping: float = 0.0

    @property
    def split(self) -> Split:
        n, k = self.weight.shape
        return Split(n, k, self.k_perm, self.dense_width)

    def dequantized(self) -> Tensor:
        """float32 [N, K]; without FP8 the weight itself."""
        if self.scale is None:
            return self.weight.float()
        return fp8_values(self.weight) * self.scale[:, None]


def fp8_values(fp8_bytes: Tensor) -> Tensor:
    """float32 of FP8 bytes (uint8)."""
    return fp8_bytes.view(torch.float8_e4m3fn).float()


def replace_weights(layer: nn.Module, modules: dict[str, PrunedModule]) -> None:
    """Give each nn.Linear its pruned weight as a new parameter of the same dtype and device."""
    for name, pruned in modules.items():
        linear = layer.get_submodule(name)
        old = linear.weight
        new = pruned.dequantized().to(device=old.device, dtype=old.dtype)
        linear.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        if pruned.bias is not None:
            bias = pruned.bias.to(device=old.device, dtype=old.dtype)
            linear.bias = nn.Parameter(bias, requires_grad=old.requires_grad)


def install(layer: nn.Module, modules: dict[str, PrunedModule]) -> None:
    """Replace each nn.Linear by a SpenseLinear on the same device (FP8), or only its weight."""
    for name, pruned in modules.items():
        if pruned.scale is None:
            replace_weights(layer, {name: pruned})
            continue
        linear = layer.get_submodule(name)
        device = linear.weight.device  # encoding there takes no time to speak of on a GPU
        weight = HybridWeight.from_dense(
            pruned.weight.to(device),
            pruned.scale.to(device),
            pruned.split,
            None if pruned.bias is None else pruned.bias.to(device).float(),
        )
        parent, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(parent), leaf, SpenseLinear.from_hybrid(weight))


def shallow_clone(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer with the original.

    prune_model replaces modules and parameters and never writes into them, so several prunes of
    one model need no second copy of its weights.
    """
    memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)
