# SPDX-License-Identifier: Apache-2.0
"""Settings of the fine-tune, checked when they are made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass

from spense_kernels.errors import PruneError


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
        steps: optimiser steps.
        minutes: time to spend instead: the first steps are timed, then `steps` becomes what fits,
            so that the learning rate reaches its end; None for `steps` as it is.
        batch: windows a step, over all processes.
        micro_batch: windows a forward pass; None for all of a process's share at once.
        lr: peak learning rate of Adam; linear warm-up, then a cosine down to `lr_end` * lr.
        warmup: steps of the warm-up.
        lr_end: share of lr that is left at the end.
        betas: of Adam.
        clip: largest norm of the gradient; 0 for no limit.
        save_every: steps between two saved states (with a work_dir).
        seed: of the order of the windows.
        splice: parts of different windows that a window is put together from, cut at random; 1 for
            windows as they are.
        noise: share of tokens that are replaced by others of the text. With this or `splice` no two
            passes over the text are alike, and the teacher's states cannot be kept.
        interpolation: where the result lies on the line between the weights at the start (0) and
            those of the last step (1); applied once, at the end.
        compile: on CUDA, fuse element-wise work with torch.compile; costs seconds at the start.
        graph: on CUDA with one process, replay steps as a CUDA graph.
    """

    steps: int = 300
    minutes: float | None = None
    batch: int = 8
    micro_batch: int | None = None
    lr: float = 1e-4
    warmup: int = 20
    lr_end: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    save_every: int = 100
    seed: int = 0
    splice: int = 1
    noise: float = 0.0
    interpolation: float = 1.0
    compile: bool = True
    graph: bool = True

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, low in (
            ("steps", 1), ("batch", 1), ("warmup", 0), ("save_every", 1), ("seed", 0),
            ("splice", 1),
        ):  # fmt: skip
            _integer(name, getattr(self, name), low)
        if self.micro_batch is not None:
            _integer("micro_batch", self.micro_batch, 1)
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise PruneError(f"FinetuneConfig: minutes must be above 0, got {self.minutes}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise PruneError(f"FinetuneConfig: lr must be above 0, got {self.lr}")
        if not 0.0 <= self.lr_end <= 1.0:
            raise PruneError(f"FinetuneConfig: lr_end must be in 0..1, got {self.lr_end}")
        if not 0.0 <= self.noise < 1.0:
            raise PruneError(f"FinetuneConfig: noise must be in 0..1, below 1, got {self.noise}")
        if not 0.0 < self.interpolation <= 1.0:
            raise PruneError(
                f"FinetuneConfig: interpolation must be in 0..1, above 0, got {self.interpolation}"
            )
        if not self.clip >= 0:
            raise PruneError(f"FinetuneConfig: clip must be at least 0, got {self.clip}")

    def share(self, step: int) -> float:
        """Learning rate of a step (0-based) over `lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr_end + (1.0 - self.lr_end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    def fitted(self, done: int, seconds: float, left: float) -> FinetuneConfig:
        """With as many steps as fit: `done` so far, `left` seconds at `seconds` a step."""
        steps = max(1, done + max(0, int(left / seconds)))
        return dataclasses.replace(
            self, steps=steps, warmup=min(self.warmup, max(done, steps // 5))
        )

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    def fingerprint(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _integer(name: str, value, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise PruneError(f"FinetuneConfig: {name} must be an int >= {low}, got {value!r}")
