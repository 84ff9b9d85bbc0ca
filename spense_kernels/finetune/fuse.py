# SPDX-License-Identifier: Apache-2.0
"""Element-wise work as few kernels, through torch.compile of small functions on CUDA."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable

import torch
from torch import nn


class Fused:
    """A function of tensors that is compiled where its first argument is on CUDA.

    Elsewhere, and where torch.compile does not work (no Triton, no C compiler: a warning says so),
    it runs as it is written. Shapes are taken as fixed: each new one compiles anew.

    Attributes:
        function: what is computed.
        on: False leaves it as it is written everywhere.
    """

    def __init__(self, function: Callable):
        self.function, self.on = function, True
        self._compiled: Callable | None = None

    def __call__(self, *args):
        if not (self.on and args[0].is_cuda):
            return self.function(*args)
        if self._compiled is None:
            self._compiled = torch.compile(self.function, dynamic=False, fullgraph=True)
        try:
            return self._compiled(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(
                f"finetune: {self.function.__qualname__} runs uncompiled, as torch.compile "
                f"failed: {text[0]}",
                stacklevel=2,
            )
            self.on = False
            return self.function(*args)


def fuse_norms(model: nn.Module) -> int:
    """Compile the RMSNorms of a model, each class once; how many there are.

    Eager ones are up to ten kernels forward and twenty backward.
    """
    fused: dict[type, Fused] = {}
    found = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    for module in found:
        kind = type(module)
        if kind not in fused:
            fused[kind] = Fused(_of_input(kind.forward))
        module.forward = types.MethodType(_forward(fused[kind]), module)
    return len(found)


def unfuse_norms(model: nn.Module) -> None:
    """Take back what fuse_norms did."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__dict__.pop("forward", None)


def _of_input(forward: Callable) -> Callable:
    def norm(x, module):
        return forward(module, x)

    return norm


def _forward(fused: Fused) -> Callable:
    def forward(module, x):
        return fused(x, module)

    return forward
