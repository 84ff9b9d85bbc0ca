# SPDX-License-Identifier: Apache-2.0
"""Count calls of our ops, to prove that a model really runs through them."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class OpCounter(TorchDispatchMode):
    """Inside `with OpCounter() as ops:` counts every call of torch.ops.<namespace>.*.

    `ops.calls["hybrid_gemm"]` is the number of calls that reached the dispatcher.
    """

    def __init__(self, namespace: str = "spense"):
        super().__init__()
        self.namespace = namespace
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == self.namespace:
            self.calls[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))
