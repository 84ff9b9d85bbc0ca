# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for pruned projections in a model that is still being pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spense_kernels import ops
from spense_kernels.linear import rows_of
from spense_kernels.prune.install import PrunedModule, replace_weights
from spense_kernels.quant import fp8_product, has_fp8_matmul, product_dtype


class Fp8Linear(nn.Module):
    """What a SpenseLinear of this weight computes, up to rounding, by an ordinary product.

    Needs no packing, so it is quick to make.
    """

    def __init__(self, pruned: PrunedModule, dtype: torch.dtype, device):
        super().__init__()
        codes = pruned.weight.to(device).view(torch.float8_e4m3fn)
        if not has_fp8_matmul(codes, dtype):
            codes = codes.to(product_dtype(dtype))
        self.register_buffer("codes", codes)
        self.register_buffer("scale", pruned.scale.to(device))
        bias = None if pruned.bias is None else pruned.bias.to(device).float()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        codes, scale = ops.quantize_fp8(rows_of(x))
        y = fp8_product(codes, scale, self.codes, self.scale, x.dtype, self.bias)
        return y.view(*x.shape[:-1], -1)


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
