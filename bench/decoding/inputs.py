# SPDX-License-Identifier: Apache-2.0
"""What the linear layers of a step are given: do random weights keep it as diverse as a model's?

The power that a GPU draws, and with it the clock of long steps, depends on how much its data change
from row to row and from value to value.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.linears import Linear
from decoding.step import Step

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SAMPLED_ROWS = 128


@dataclass(frozen=True)
class Inputs:
    """x8 of one linear layer, by at most SAMPLED_ROWS of its rows; shares are of all their values.

    size: root of the mean square, of the largest FP8 number; cosine: mean over pairs of rows, 0 for
    a single one.
    """

    layer: int
    name: str
    zero: float
    largest: float
    size: float
    cosine: float


class _Watched:
    """A linear layer that notes what it is given."""

    def __init__(self, linear: Linear, layer: int, name: str, found: list[Inputs]):
        self.linear, self.layer, self.name, self.found = linear, layer, name, found
        self.gather = linear.gather

    def __call__(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        y = self.linear(x8, x_scale)
        if not (x_scale.isfinite().all() and y.isfinite().all()):
            raise RuntimeError(f"layer {self.layer}, {self.name}: not finite")
        self.found.append(_described(self.layer, self.name, x8))
        return y


def _described(layer: int, name: str, x8: Tensor) -> Inputs:
    x = x8[:: -(-x8.shape[0] // SAMPLED_ROWS)].float()
    rows = F.normalize(x, dim=1)
    count = rows.shape[0]
    pairs = (rows @ rows.t()).sum() - rows.square().sum()
    numbers = (
        (x == 0).float().mean(),
        (x.abs() == LARGEST).float().mean(),
        x.square().mean().sqrt() / LARGEST,
        pairs / max(1, count * (count - 1)),
    )
    return Inputs(layer, name, *(round(float(number), 5) for number in numbers))


def inputs_of(step: Step, layers: Collection[int]) -> list[Inputs]:
    """Runs the step once and describes what the linear layers of these decoder layers were given.

    Raises:
        RuntimeError: a scale, or a result of a linear layer, is infinite or not a number.
    """
    found: list[Inputs] = []
    kept = [layer.linears for layer in step.weights.layers]
    try:
        for index in layers:
            layer = step.weights.layers[index]
            layer.linears = {
                name: _Watched(linear, index, name, found) for name, linear in kept[index].items()
            }
        step.run()
    finally:
        for layer, linears in zip(step.weights.layers, kept, strict=True):
            layer.linears = linears
    return found
