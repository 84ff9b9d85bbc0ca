# SPDX-License-Identifier: Apache-2.0
"""Element-wise work as few kernels, through torch.compile of small functions on CUDA."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from spense_kernels.errors import first_line

_SHAPES = 64  # that a function may be compiled for
_ATTENTION, _ROTARY = "Attention", "apply_rotary_pos_emb"  # names in transformers


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

    def __call__(self, *args, **options):
        if not (self.on and args[0].is_cuda):
            return self.function(*args, **options)
        if self._compiled is None:
            self._compiled = torch.compile(self.function, dynamic=False, fullgraph=True)
        dynamo = torch._dynamo
        try:
            with dynamo.config.patch(recompile_limit=_SHAPES):
                return self._compiled(*args, **options)
        except (dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit) as error:
            name = getattr(self.function, "__name__", "a function")
            warnings.warn(
                f"finetune: {name} runs uncompiled, as torch.compile failed: {first_line(error)}",
                stacklevel=2,
            )
            self.on = False
            return self.function(*args, **options)


@contextmanager
def fused_norms(*models: nn.Module) -> Iterator[None]:
    """Run the RMSNorms of models compiled; each class is compiled once.

    Eager ones are up to ten kernels forward and twenty backward.
    """
    fused: dict[type, Fused] = {}
    every = (m for model in models for m in model.modules())
    found = [m for m in every if type(m).__name__.endswith("RMSNorm")]
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


@contextmanager
def fused_rotary(model: nn.Module) -> Iterator[None]:
    """Run the rotary embedding of a transformers model compiled: one kernel each way, not eight.

    Models call it as a global function of their file, so it is changed there.
    """
    attention = {type(m).__module__ for m in model.modules() if _ATTENTION in type(m).__name__}
    files = [sys.modules[name] for name in attention if hasattr(sys.modules[name], _ROTARY)]
    plain = [getattr(file, _ROTARY) for file in files]
    try:
        for file, function in zip(files, plain, strict=True):
            setattr(file, _ROTARY, Fused(function))
        yield
    finally:
        for file, function in zip(files, plain, strict=True):
            setattr(file, _ROTARY, function)


def _of_input(forward: Callable) -> Callable:
    def norm(x, module):
        return forward(module, x)

    return norm


def _forward(fused: Fused) -> Callable:
    def forward(module, x):
        return fused(x, module)

    return forward
