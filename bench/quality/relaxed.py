# SPDX-License-Identifier: Apache-2.0
"""A relaxed pattern to compare with: 6 of every 8 weights kept, in every column.

The hybrid format spends its extra bytes on whole dense columns; this spends them evenly. Weights
stay float: no kernel of ours runs the pattern. A byte count needs a storage form; there are two:

* as tight as whole bits allow: 6 values and 5 bits a group (28 patterns), 0.828 byte a weight;
* as 2:4 tensor cores can run it: 8 columns stretched to 12, three 2:4 groups, 0.9375 byte.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spense_kernels.prune import PruneConfig, Statistics
from spense_kernels.prune.groups import decoder_layers
from spense_kernels.prune.hessian import damped_factor
from spense_kernels.prune.plan import Curvature
from spense_kernels.prune.refit import refit

KEEP, OF = 6, 8
TIGHT_BYTES = (KEEP + 5 / 8) / OF
STRETCHED_BYTES = 0.625 * 12 / OF
_BLOCK = 128


def equal_fraction(bytes_a_weight: float) -> float:
    """Dense fraction at which the hybrid format stores as many bytes: d + 5/8 (1 - d)."""
    return (bytes_a_weight - 0.625) / 0.375


def relaxed_sweep(weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """SparseGPT's sweep with 6 of 8 in place of 2 of 4.

    Args:
        weight: float32 [N, K], K a multiple of 8.
        factor: float32 [K, K] upper triangular U with H^-1 = U^T U.

    Returns (weight, bool mask), both [N, K]. Raises ValueError for another K.
    """
    n, k = weight.shape
    if k % OF:
        raise ValueError(f"relaxed_sweep: K: expected a multiple of {OF}, got {k}")
    work = weight.clone()
    mask = torch.ones(n, k, dtype=torch.bool, device=weight.device)
    for a in range(0, k, _BLOCK):
        b = min(a + _BLOCK, k)
        error = torch.zeros(n, b - a, device=weight.device)
        for j in range(a, b):
            if j % OF == 0:
                group = slice(j, j + OF)
                scores = (work[:, group] / factor.diagonal()[group]).square()
                drop = scores.topk(OF - KEEP, dim=1, largest=False).indices
                mask[:, group] = mask[:, group].scatter(1, drop, False)
            error[:, j - a] = work[:, j] * ~mask[:, j] / factor[j, j]
            work[:, j:b] -= error[:, j - a, None] * factor[j, j:b]
        work[:, b:] -= error @ factor[a:b, b:]
    return work * mask, mask


@torch.no_grad()
def prune_relaxed(
    model: nn.Module, statistics: Statistics, tokens: int, config: PruneConfig, device
) -> None:
    """Prune the projections of all decoder layers in place to 6:8.

    Args:
        statistics: on the model; its token weighting is the config's.
        tokens: that the Hessians were summed over.
        config: refit_steps, damping, sinks and token weighting count.
    """
    prefix, layers = decoder_layers(model)
    gradients = statistics.gradients if config.needs_gradients else None
    curvature = Curvature(gradients, tokens, config)
    for index, layer in enumerate(layers):
        found = statistics.layers[index]
        for group in found.groups:
            hessian = curvature.of(group, found.hessians, f"{prefix}.{index}.", device)
            several = hessian if isinstance(hessian, list) else [hessian] * len(group.modules)
            for name, h in zip(group.modules, several, strict=True):
                module = layer.get_submodule(name)
                old = module.weight
                target = old.detach().to(device).float()
                factor = damped_factor(h, config.damping, name)[1]
                weight, mask = relaxed_sweep(target, factor)
                weight = refit(weight[None], target[None], mask[None], h[None], config.refit_steps)
                new = weight[0].to(device=old.device, dtype=old.dtype)
                module.weight = nn.Parameter(new, requires_grad=False)
