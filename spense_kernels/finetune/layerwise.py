# SPDX-License-Identifier: Apache-2.0
"""Layer by layer instead of the whole model: for models of which one layer fits, but not all.

Each decoder layer learns to give, for what the layers before it hand on, what the dense model's
layer gives for what it was handed. One layer of each model is on the device at a time; hidden
states wait where the models live.
"""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spense_kernels.errors import PruneError, SpenseError
from spense_kernels.finetune.config import FinetuneConfig
from spense_kernels.finetune.report import Report
from spense_kernels.finetune.student import finish_student, make_student, student_layers
from spense_kernels.linear import SpenseLinear
from spense_kernels.prune.calibrate import LayerWalk

_UNUSED = ("minutes", "micro_batch", "splice", "noise", "interpolation")


def unused_settings(config: FinetuneConfig) -> list[str]:
    """Names of settings that a layer's own loop has no use for and that are not as by default."""
    plain = FinetuneConfig()
    return [name for name in _UNUSED if getattr(config, name) != getattr(plain, name)]


@dataclass
class LayerwiseReport(Report):
    """What `reconstruct` did.

    Attributes:
        config: settings used; `steps` were taken for every layer, `warmup` is at most a fifth.
        losses: (before, after) of every decoder layer, see `relative_error`; both None for a layer
            without a SpenseLinear. A layer that did not get better is as it was, with equal losses.
        tokens: token positions that every layer trained on; fewer where the last batch is smaller.
    """

    losses: list[tuple[float, float] | tuple[None, None]] = field(default_factory=list)


def reconstruct(
    pruned: nn.Module,
    teacher: nn.Module,
    windows: Tensor,
    config: FinetuneConfig | None = None,
    *,
    device="cpu",
    progress=None,
) -> LayerwiseReport:
    """Fit the outputs of every decoder layer to the dense model's; masks stay, changes in place.

    Args:
        pruned: causal LM whose decoder layers hold SpenseLinear; so they do afterwards.
        teacher: the dense model that it was pruned from, of the same class.
        windows: int64 [S, L] tokens.
        config: `steps` a layer, `batch` windows a step, and the rest as for `finetune`; settings
            that only a whole model has (`minutes`, `micro_batch`, `splice`, `noise`,
            `interpolation`) must be left as they are by default. None for the defaults.
        device: where layers compute, one of each model at a time.
        progress: object with start(stage, total), advance(count), finish(), or None.

    Raises PruneError when there is nothing to train, and for settings as above; SpenseError when a
    loss is not finite.
    """
    config = config or FinetuneConfig()
    if unused := unused_settings(config):
        name = unused[0]
        raise PruneError(
            f"finetune: layer by layer: {name}: expected {getattr(FinetuneConfig(), name)!r}, "
            f"got {getattr(config, name)!r}"
        )
    if not any(isinstance(m, SpenseLinear) for m in pruned.modules()):
        raise PruneError(f"finetune: {type(pruned).__name__} holds no SpenseLinear")
    # Steps of one layer are few.
    config = dataclasses.replace(config, warmup=min(config.warmup, config.steps // 5))
    begin = time.monotonic()
    dense = LayerWalk(teacher, windows, device, config.batch)
    tuned = LayerWalk(pruned, windows, device, config.batch, prefix=dense.prefix)
    report = LayerwiseReport(config, tokens=config.steps * config.batch * windows.shape[1])
    if progress is not None:
        progress.start("fine-tune, layer by layer", len(dense.layers))
    for index in range(len(dense.layers)):
        with dense.on_device(index):
            dense.forward(index)
        with tuned.on_device(index) as layer:
            report.losses.append(_Layer(layer, index, tuned, dense.hidden, config).train())
            tuned.forward(index)
        if progress is not None:
            progress.advance()
    if progress is not None:
        progress.finish()
    report.seconds = time.monotonic() - begin
    return report


def relative_error(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of |given - wanted|^2 / |wanted|^2, float32; hidden states [..., D].

    By token, because a norm follows, and because the first token of many models is so large that
    nothing else would count.
    """
    wanted = wanted.float()
    error = (given.float() - wanted).square().sum(dim=-1)
    return (error / wanted.square().sum(dim=-1).clamp_min(1e-12)).mean()


class _Layer:
    """One decoder layer on the device, its inputs and what it should make of them."""

    def __init__(self, layer, index: int, walk: LayerWalk, wanted: list[Tensor], config):
        self.layer, self.index, self.walk = layer, index, walk
        self.wanted, self.config = wanted, config

    def train(self) -> tuple[float, float] | tuple[None, None]:
        """Relative errors before and after; the layer keeps what is better."""
        if not any(isinstance(m, SpenseLinear) for m in self.layer.modules()):
            return None, None
        with _as_student(self.layer):
            weights = [m.weight for m in student_layers(self.layer).values()]
            before, kept = self._error(), [weight.detach().clone() for weight in weights]
            self._steps(weights)
            after = self._error()
            if not after < before:
                after = before
                with torch.no_grad():
                    for weight, old in zip(weights, kept, strict=True):
                        weight.copy_(old)
        return before, after

    def _steps(self, weights: list[nn.Parameter]) -> None:
        config = self.config
        optimizer = torch.optim.Adam(weights, lr=config.lr, betas=config.betas)
        random = torch.Generator().manual_seed((config.seed << 20) + self.index)
        order: list[int] = []
        for step in range(config.steps):
            order = order or torch.randperm(len(self.wanted), generator=random).tolist()
            for group in optimizer.param_groups:
                group["lr"] = config.lr * config.share(step)
            self._loss(order.pop()).backward()
            if config.clip:
                nn.utils.clip_grad_norm_(weights, config.clip)
            optimizer.step()
            optimizer.zero_grad()

    def _loss(self, batch: int) -> Tensor:
        device = self.walk.device
        given = self.walk.call(self.index, self.walk.hidden[batch].to(device))
        return relative_error(given, self.wanted[batch].to(device))

    @torch.no_grad()
    def _error(self) -> float:
        """Over all windows."""
        sizes = [len(hidden) for hidden in self.wanted]
        losses = [float(self._loss(batch)) for batch in range(len(sizes))]
        error = sum(s * e for s, e in zip(sizes, losses, strict=True)) / sum(sizes)
        if not math.isfinite(error):
            raise SpenseError(f"finetune: the error of decoder layer {self.index} is {error}")
        return error


@contextmanager
def _as_student(layer: nn.Module):
    """The layer's SpenseLinear as StudentLinear, FP8 again afterwards."""
    make_student(layer)
    try:
        yield
    finally:
        finish_student(layer)
