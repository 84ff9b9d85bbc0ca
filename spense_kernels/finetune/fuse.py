# SPDX-License-Identifier: Apache-2.0
"""Element-wise work as few kernels, through torch.compile of small functions on CUDA."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_SHAPES = 64  # that a function may be compiled for


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
        dynamo = torch._dynamo
        try:
            with dynamo.config.patch(recompile_limit=_SHAPES):
                return self._compiled(*args)
        except (dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit) as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(
                f"finetune: {self.function.__qualname__} runs uncompiled, as torch.compile "
                f"failed: {text[0]}",
                stacklevel=2,
            )
            self.on = False
            return self.function(*args)


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """Run the RMSNorms of a model compiled; each class is compiled once.

    Eager ones are up to ten kernels forward and twenty backward.
    """
    fused: dict[type, Fused] = {}
    found = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    try:
        for module in found:
            kind = type(module)
            if kind not in fused:
                fused[kind] = Fused(_of_input(kind.forward))
            module.forward = types.MethodType(_forward(fused[kind]), module)
        yield
    finally:
        for module in found:
            module.__dict__.pop("forward", None)


def _of_input(forward: Callable) -> Callable:
    def norm(x, module):
        return forward(module, x)

    return norm


def _forward(fused: Fused) -> Callable:
    def forward(module, x):
        return fused(x, module)

    return forward
