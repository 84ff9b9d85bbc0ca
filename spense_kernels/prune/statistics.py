# SPDX-License-Identifier: Apache-2.0
"""Calibration statistics of a dense model, collected once and used for several prunes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from spense_kernels.errors import PruneError
from spense_kernels.prune.calibrate import LayerWalk
from spense_kernels.prune.clock import Clock
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.groups import Group, decoder_layers
from spense_kernels.prune.hessian import Shelf
from spense_kernels.prune.sensitivity import Gradients, collect_gradients
from spense_kernels.prune.store import tensor_digest, write_atomic


class Quiet:
    """Progress that shows nothing; what prune_model uses without one."""

    def start(self, stage: str, total: int) -> None:
        pass

    def advance(self, count: int = 1) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass
class LayerStatistics:
    """Groups of one decoder layer and H float32 [K, K] of each, by the group's name, on any
    device."""

    groups: list[Group]
    hessians: dict[str, Tensor]


@dataclass
class Statistics:
    """Hessians of all layers under the dense model.

    Attributes:
        layers: one a decoder layer, and one more for `PruneConfig.modules` when it names any.
        token_weighting: setting they were collected with.
        gradients: of one backward pass, or None when it was not asked for.
        calibration: {"sequences", "tokens", "sha256"} of the tokens.
        seconds: wall-clock time that they took, "statistics" and "sensitivity".
        curves: row losses that a prune has worked out, for the next one at another dense fraction;
            by `PruneConfig.curves_key`, not saved.
    """

    layers: list[LayerStatistics]
    token_weighting: str
    gradients: Gradients | None = None
    calibration: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(h.numel() * 4 for layer in self.layers for h in layer.hessians.values())

    def save(self, path) -> None:
        """Write to a file, beside it first."""
        layers = [
            {"groups": [asdict(g) for g in layer.groups], "hessians": layer.hessians}
            for layer in self.layers
        ]
        gradients = None if self.gradients is None else vars(self.gradients)
        value = {**vars(self), "layers": layers, "gradients": gradients, "curves": {}}
        write_atomic(Path(path), lambda file: torch.save(value, file))

    @classmethod
    def load(cls, path) -> Statistics:
        """Read what `save` wrote; Hessians stay mapped to the file until they are used."""
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        value["layers"] = [
            LayerStatistics(
                [Group(**{**g, "modules": tuple(g["modules"])}) for g in layer["groups"]],
                layer["hessians"],
            )
            for layer in value["layers"]
        ]
        if value["gradients"] is not None:
            value["gradients"] = Gradients(**value["gradients"])
        return cls(**value)


def describe_calibration(calibration: Tensor) -> dict:
    return {
        "sequences": calibration.shape[0],
        "tokens": calibration.numel(),
        "sha256": tensor_digest(calibration),
    }


def collect_statistics(
    model: nn.Module,
    calibration: Tensor,
    config: PruneConfig | None = None,
    *,
    progress=None,
    device="cpu",
    batch: int | None = None,
) -> Statistics:
    """One forward pass of the dense model. Hessians wait on the CPU, on a GPU while they are small.

    Args:
        model: causal LM with decoder layers made of nn.Linear.
        calibration: int64 [S, L] token ids.
        config: token weighting, names to skip, and whether sensitivity is needed (staircase).
        progress: object with start(stage, total), advance(count), finish(), or None.
        device: where one layer at a time computes.
        batch: sequences a forward pass; None for what suits the device (see `batch_size`).

    Memory: 4 K^2 bytes a group (430 MB for Gemma-3-270m). Models where that is too much should
    let prune_model stream instead.
    """
    config = config or PruneConfig()
    progress = progress or Quiet()
    clock = Clock(device)
    with clock.phase("statistics"):
        layers = _layers(model, calibration, config, progress, device, batch)
    statistics = Statistics(
        layers, config.token_weighting, calibration=describe_calibration(calibration)
    )
    if config.needs_gradients:
        with clock.phase("sensitivity"):
            add_gradients(statistics, model, calibration, config, progress, device)
    statistics.seconds = clock.seconds
    return statistics


def _layers(
    model, calibration: Tensor, config: PruneConfig, progress, device, batch: int | None
) -> list[LayerStatistics]:
    walk = LayerWalk(model, calibration, device, batch)
    layers, shelf = [], Shelf(device)
    progress.start("calibrate", len(walk.layers))
    for index in range(len(walk.layers)):
        with walk.on_device(index):
            groups = walk.find_groups(index, config.skip)
            hessians = walk.hessians(index, groups, config.token_weighting)
        layers.append(LayerStatistics(groups, {k: shelf.put(h) for k, h in hessians.items()}))
        progress.advance()
    if config.modules:
        layers.append(LayerStatistics(*walk.outside(model, config.modules)))
    progress.finish()
    return layers


def add_gradients(
    statistics: Statistics, model, calibration: Tensor, config: PruneConfig, progress, device
) -> None:
    """Fill `statistics.gradients` with one backward pass over the last sequences."""
    count = len(decoder_layers(model)[1])
    progress.start("sensitivity", count)
    statistics.gradients = collect_gradients(
        model,
        calibration[-config.sensitivity_sequences :],
        [layer.groups for layer in statistics.layers[:count]],
        device=device,
        stride=config.sensitivity_stride,
        batch=config.sensitivity_batch,
        hessians=config.gradient_share > 0.0,
        power=config.gradient_power,
        labels=config.sensitivity_labels,
        seed=config.seed,
        advance=progress.advance,
    )
    progress.finish()


def check_statistics(statistics: Statistics, config: PruneConfig) -> None:
    """Raise PruneError when the statistics do not fit the settings."""
    if config.calibration == "sequential":
        raise PruneError("prune_model: calibration 'sequential' cannot use collected statistics")
    if statistics.token_weighting != config.token_weighting:
        raise PruneError(
            f"prune_model: statistics have token_weighting {statistics.token_weighting!r}, "
            f"the config asks for {config.token_weighting!r}"
        )
    known = {name for layer in statistics.layers for g in layer.groups for name in g.modules}
    missing = [name for name in config.modules if name not in known]
    if missing:
        raise PruneError(f"prune_model: statistics lack the module {missing[0]!r}")
    if config.needs_gradients and statistics.gradients is None:
        raise PruneError("prune_model: these settings need statistics with sensitivity")
    if config.needs_gradients and config.gradient_share and not statistics.gradients.hessians:
        raise PruneError("prune_model: gradient_share needs statistics collected with it")
