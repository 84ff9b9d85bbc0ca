# SPDX-License-Identifier: Apache-2.0
"""Distance between the outputs of two models' decoder layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spense_kernels.prune.groups import decoder_layers


class LayerOutputs:
    """What the decoder layers of student and teacher gave in their last forward passes."""

    def __init__(self):
        self._given: list[Tensor] = []
        self._wanted: list[Tensor] = []

    @contextmanager
    def watched(self, student: nn.Module, teacher: nn.Module) -> Iterator[None]:
        """Keep the outputs of their forward passes in here."""
        name, layers = decoder_layers(teacher)
        handles = [layer.register_forward_hook(_kept_in(self._wanted)) for layer in layers]
        for layer in student.get_submodule(name):
            handles.append(layer.register_forward_hook(_kept_in(self._given)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.clear()

    def clear(self) -> None:
        self._given.clear()
        self._wanted.clear()

    def distance(self) -> Tensor:
        """Float32 mean over layers and tokens of |given - wanted|^2 / |wanted|^2, and clear.

        First tokens are left out: where attention uses them as a sink, their outputs are far larger
        than the others and nearly the same in every window.
        """
        total = torch.zeros((), device=self._given[0].device)
        for given, wanted in zip(self._given, self._wanted, strict=True):
            given, wanted = given[:, 1:].float(), wanted[:, 1:].float()
            size = wanted.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            total = total + ((given - wanted).square().sum(dim=-1) / size).mean()
        total = total / len(self._given)
        self.clear()
        return total


def _kept_in(found: list[Tensor]):
    def hook(module, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    return hook
