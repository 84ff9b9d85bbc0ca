# SPDX-License-Identifier: Apache-2.0
"""RMSNorms of known classes on torch's own kernel for them."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from spense_kernels.neighbours import NORMS


@contextmanager
def fast_norms(layer: nn.Module) -> Iterator[None]:
    """Run the RMSNorms of a layer as one float32 kernel between two casts where x is on CUDA.

    As transformers writes them they are eight kernels forward and twice as many backward, a large
    share of a small model's time. Results are the same up to rounding. Gradients reach inputs but
    not the norms' weights. A norm that has a forward of its own is left alone.
    """
    found = [
        m
        for m in layer.modules()
        if type(m).__name__ in NORMS and "forward" not in vars(m) and m.weight.is_cuda
    ]
    for module in found:
        module.forward = types.MethodType(_forward(type(module).forward), module)
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _forward(plain: Callable) -> Callable:
    def forward(module: nn.Module, x: Tensor) -> Tensor:
        return rms_norm(module, x) if x.is_cuda else plain(module, x)

    return forward


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """What an RMSNorm of `NORMS` gives for x [..., K], in x's dtype."""
    attribute, unit_offset = NORMS[type(module).__name__]
    weight = module.weight.detach().float()
    if unit_offset:
        weight = 1.0 + weight
    eps = getattr(module, attribute)
    return nn.functional.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
