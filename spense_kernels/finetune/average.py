# SPDX-License-Identifier: Apache-2.0
"""Mean of the weights over a run of steps."""

from __future__ import annotations

import torch
from torch import Tensor


class WeightMean:
    """Running mean of weights that change in place; zeros that stay zero are so in the mean.

    Attributes:
        count: how many states of the weights are in it.
    """

    def __init__(self, weights: list[Tensor]):
        self.count = 0
        self._weights = weights
        self._means: list[Tensor] = []

    @torch.no_grad()
    def add(self) -> None:
        """Take in the weights as they stand."""
        self.count += 1
        if self.count == 1:
            self._means = [weight.detach().clone() for weight in self._weights]
            return
        for mean, weight in zip(self._means, self._weights, strict=True):
            mean.lerp_(weight, 1.0 / self.count)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the mean in the place of the weights; nothing when it is of none."""
        for mean, weight in zip(self._means, self._weights, strict=bool(self.count)):
            weight.copy_(mean)

    def state_dict(self) -> dict:
        return {"count": self.count, "means": self._means}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        found = zip(state["means"], self._weights, strict=bool(self.count))
        self._means = [mean.to(weight.device) for mean, weight in found]
