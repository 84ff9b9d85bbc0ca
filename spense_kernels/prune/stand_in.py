# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for pruned projections in a model that is still being pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spense_kernels import ops
from spense_kernels.linear import rows_of
from spense_kernels.prune.install import PrunedModule, fp8_values, replace_weights


class Fp8Linear(nn.Module):
    """What a SpenseLinear of this weight computes, up to rounding, by an ordinary product.

    Needs no packing, so it is quick to make. Codes are exact in bfloat16.
    """

    def __init__(self, pruned: PrunedModule, dtype: torch.dtype, device):
        super().__init__()
        # Products of codes overflow float16.
        dtype = torch.float32 if dtype == torch.float16 else dtype
        self.register_buffer("codes", fp8_values(pruned.weight.to(device)).to(dtype))
        self.register_buffer("scale", pruned.scale.to(device))
        bias = None if pruned.bias is None else pruned.bias.to(device).float()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        codes, scale = ops.quantize_fp8(rows_of(x))
        y = (codes.to(self.codes.dtype) @ self.codes.T).float() * scale[:, None] * self.scale
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def stand_in(layer: nn.Module, modules: dict[str, PrunedModule]) -> None:
    """Put pruned projections into a layer, ready to run where it is."""
    for name, pruned in modules.items():
        if pruned.scale is None:
            replace_weights(layer, {name: pruned})
            continue
        weight = layer.get_submodule(name).weight
        parent, _, leaf = name.rpartition(".")
        module = Fp8Linear(pruned, weight.dtype, weight.device)
        setattr(layer.get_submodule(parent), leaf, module)
