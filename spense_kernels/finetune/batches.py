# SPDX-License-Identifier: Apache-2.0
"""Which windows a step learns from, and how they are changed so that no two passes are alike."""

from __future__ import annotations

import torch
from torch import Tensor

from spense_kernels.finetune.config import FinetuneConfig


class Batches:
    """Windows by step; the same for the same seed, on every process and after a resume.

    Attributes:
        changed: whether windows are spliced or noisy, so that none comes twice.
    """

    def __init__(self, windows: Tensor, config: FinetuneConfig):
        self.windows, self.config = windows, config
        self.changed = config.splice > 1 or config.noise > 0

    def rows(self, step: int) -> Tensor:
        """int64 [batch]: one shuffled pass over the windows after another."""
        count, batch = self.windows.shape[0], self.config.batch
        places = torch.arange(step * batch, (step + 1) * batch)
        rows = []
        for epoch in sorted(set((places // count).tolist())):
            seed = (self.config.seed << 20) + epoch
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            rows.append(order[places[places // count == epoch] % count])
        return torch.cat(rows)

    def ids(self, step: int, rows: Tensor) -> Tensor:
        """int64 [len(rows), L] tokens of a step, for all of its rows."""
        found = self.windows[rows]
        if not self.changed:
            return found
        seed = (self.config.seed << 32) + step
        generator = torch.Generator().manual_seed(seed)
        if self.config.splice > 1:
            found = self._spliced(rows, generator)
        if self.config.noise:
            replaced = torch.rand(found.shape, generator=generator) < self.config.noise
            replaced[:, 0] = False  # the token that a window starts with
            found = torch.where(replaced, self._any(found.shape, generator), found)
        return found

    def _spliced(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Windows that begin as those of `rows` do and go on as others, at random places."""
        count, length = self.windows.shape
        parts = self.config.splice
        sources = torch.randint(count, (len(rows), parts), generator=generator)
        sources[:, 0] = rows
        cuts = torch.randint(1, length, (len(rows), parts - 1), generator=generator)
        places = torch.arange(length)
        part = (places >= cuts[:, :, None]).sum(dim=1)
        return self.windows[sources.gather(1, part), places]

    def _any(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Tokens from anywhere in the text but the starts of windows."""
        count, length = self.windows.shape
        rows = torch.randint(count, shape, generator=generator)
        return self.windows[rows, torch.randint(1, length, shape, generator=generator)]
