# SPDX-License-Identifier: Apache-2.0
"""prune_model: plan, prune and install layer by layer, with finished layers kept on disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spense_kernels.errors import PruneError
from spense_kernels.prune.calibrate import LayerWalk, check_calibration
from spense_kernels.prune.clock import Clock, phase
from spense_kernels.prune.compress import column_orders, compress
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.correct import Corrector
from spense_kernels.prune.groups import Group, decoder_layers, outside_modules
from spense_kernels.prune.install import PrunedModule, install, replace_weights
from spense_kernels.prune.plan import (
    Curvature,
    LayerPlan,
    layer_curves,
    seeded,
    staircase_plans,
    uniform_plan,
)
from spense_kernels.prune.refit import DAMPING
from spense_kernels.prune.report import ModuleReport, PruneReport
from spense_kernels.prune.sensitivity import Gradients
from spense_kernels.prune.statistics import (
    LayerStatistics,
    Quiet,
    Statistics,
    add_gradients,
    check_statistics,
    describe_calibration,
)
from spense_kernels.prune.store import Store, model_fingerprint
from spense_kernels.prune.tasks import alike, layer_tasks

LayerCallback = Callable[[nn.Module, dict[str, PrunedModule]], None]


def prune_model(
    model: nn.Module,
    calibration: Tensor,
    config: PruneConfig | None = None,
    *,
    statistics: Statistics | None = None,
    progress=None,
    work_dir=None,
    device="cpu",
    batch: int | None = None,
    layers_at_once: int = 1,
    on_layer: LayerCallback = install,
) -> PruneReport:
    """Prune the projections of all decoder layers in place.

    Args:
        model: causal LM whose decoder layers are made of nn.Linear. With FP8 every projection
            becomes a SpenseLinear, else it keeps its place with pruned weights. Tensors of the
            model are replaced, never written to, so a `shallow_clone` may share them.
        calibration: int64 [S, L] token ids.
        config: settings; None for the defaults.
        statistics: from collect_statistics on the same model and calibration; None streams:
            Hessians of one layer at a time.
        progress: object with start(stage, total), advance(count), finish(), or None.
        work_dir: folder for finished layers. A second call with the same model, calibration and
            settings goes on from there; None keeps nothing.
        device: where the layer in work computes; the model stays where it is.
        batch: sequences a forward pass; None for what suits the device (see `batch_size`).
        layers_at_once: layers pruned together when statistics are given; more fill a GPU, need
            memory in proportion, and are lost together in a kill.
        on_layer: what to do with the pruned projections of a layer.

    Raises PruneError for NaN or Inf in weights or activations (naming the projection), for a
    Hessian that no damping repairs, and for a work_dir of another run. Projections of layers that
    were finished before stay replaced in that case.
    """
    config = config or PruneConfig()
    run = _Run(model, calibration, config, statistics, progress, work_dir, device, batch)
    run.at_once = 1 if statistics is None else max(1, layers_at_once)
    with run.clock, phase("other"):
        return run.prune(on_layer)


class _Run:
    def __init__(self, model, calibration, config, statistics, progress, work_dir, device, batch):
        check_calibration(calibration)
        self.model, self.calibration, self.config = model, calibration, config
        self.statistics = statistics
        self.progress = progress or Quiet()
        self.device = torch.device(device)
        self.streamed: Statistics | None = None
        self.curvature: Curvature | None = None
        self.corrector: Corrector | None = None
        self.batch, self.at_once = batch, 1
        self.prefix, self.layers = decoder_layers(model)
        self.clock = Clock(self.device)
        described = describe_calibration(calibration)
        self.report = PruneReport(config, phases=self.clock.seconds, calibration=described)
        # The model itself stands last for the modules outside the layers that were asked for.
        self.units = [*self.layers, *([model] if config.modules else [])]
        _check_weights(model, self.prefix, config.modules)
        if statistics is not None:
            check_statistics(statistics, config)
            if statistics.calibration["sha256"] != self.report.calibration["sha256"]:
                raise PruneError("prune_model: statistics come from another calibration")
        self.store = Store(work_dir, self._fingerprint() if work_dir is not None else "")

    def _fingerprint(self) -> str:
        parts = (
            self.config.fingerprint(),
            model_fingerprint(self.model),
            self.report.calibration["sha256"],
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def name(self, index: int) -> str:
        """Prefix of the full names of a unit's modules."""
        return f"{self.prefix}.{index}." if index < len(self.layers) else ""

    @contextmanager
    def _timed(self, stage: str):
        begin = time.monotonic()
        yield
        seconds = self.report.seconds
        seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - begin

    def prune(self, on_layer: LayerCallback) -> PruneReport:
        self.curvature = self._curvature()
        plans = self._staircase() if self._is_staircase() else None
        walk = None
        if self.statistics is None:
            walk = LayerWalk(self.model, self.calibration, self.device, self.batch)
        if self.config.correct and self.config.dense_fraction < 1.0:
            with phase("embed"):
                self.corrector = Corrector(
                    self.model,
                    self.calibration,
                    self.config,
                    self.curvature.gradients,
                    self.device,
                    self.batch,
                )
        self.progress.start("prune", len(self.units))
        for first in range(0, len(self.units), self.at_once):
            chunk = range(first, min(first + self.at_once, len(self.units)))
            stored = {index: self.store.get(f"layer_{index:04d}") for index in chunk}
            self._prune_layers(stored, walk, plans)
            for index in chunk:
                self._put(index, stored[index], walk, on_layer)
        self.progress.finish()
        return self.report

    def _prune_layers(self, stored: dict[int, dict | None], walk, plans) -> None:
        """Fill in what is missing, several layers in one go, and store it."""
        tasks = []
        for index, found in stored.items():
            groups, hessians = self._statistics_of(index, walk, needed=found is None)
            if found is None:
                module = self.units[index]
                planned = plans is not None and index < len(self.layers)
                plan = plans[index] if planned else uniform_plan(module, groups, self.config)
                with phase("hessians"):
                    tasks.append(
                        layer_tasks(
                            index, module, groups, hessians, plan, self.curvature,
                            self.name(index), self.device,
                        )
                    )  # fmt: skip
            else:
                self.report.notes.append(f"{self.name(index)}: taken from work_dir")
        with self._timed("prune"):
            for same in alike(tasks):
                problems = [task.problem for task in same]
                seeds = [seeded(self.config, problem.name) for problem in problems]
                if self._corrects(same[0].index):
                    orders = column_orders(problems, self.config, seeds)
                    for problem, k_perm in zip(problems, orders, strict=True):
                        problem.k_perm = k_perm
                    continue
                solutions = compress(problems, self.config, seeds)
                for task, solution in zip(same, solutions, strict=True):
                    task.finish(solution)
        missing = {of_layer[0].index: of_layer for of_layer in tasks}
        for index in stored:
            if self._corrects(index):
                modules = self._correct(index, stored[index], missing.get(index))
            elif index in missing:
                modules = {name: m for task in missing[index] for name, m in task.result.items()}
            if index in missing:
                stored[index] = {name: vars(m) for name, m in modules.items()}
                self.store.put(f"layer_{index:04d}", stored[index])

    def _corrects(self, index: int) -> bool:
        return self.corrector is not None and index < len(self.layers)

    def _correct(self, index: int, stored: dict | None, tasks) -> dict[str, PrunedModule]:
        """The layer's modules aimed at the dense model's outputs; stored ones as they are."""
        with self._timed("correct"):
            if tasks is not None:
                return self.corrector.correct(index, tasks)
            modules = {name: PrunedModule(**fields) for name, fields in stored.items()}
            self.corrector.advance(index, modules)
            return modules

    def _put(self, index: int, stored: dict, walk, on_layer: LayerCallback) -> None:
        layer, in_list = self.units[index], index < len(self.layers)
        modules = {name: PrunedModule(**fields) for name, fields in stored.items()}
        if in_list and walk is not None and self.config.calibration == "sequential":
            replace_weights(layer, modules)
            with walk.on_device(index):
                walk.forward(index)
        with phase("install"):
            on_layer(layer, modules)
        self._record(index, modules)
        self.progress.advance()

    def _is_staircase(self) -> bool:
        return self.config.strategy == "staircase" and 0.0 < self.config.dense_fraction < 1.0

    def _statistics_of(self, index: int, walk: LayerWalk | None, needed: bool):
        if self.statistics is not None:
            layer = self.statistics.layers[index]
            return layer.groups, layer.hessians
        if index == len(self.layers):
            with self._timed("calibrate"):
                return walk.outside(self.model, self.config.modules) if needed else (None, None)
        static = self.config.calibration == "static"
        with self._timed("calibrate"), phase("statistics"), walk.on_device(index):
            if not needed:
                if static:
                    walk.forward(index)
                return None, None
            groups = walk.find_groups(index, self.config.skip)
            return groups, walk.hessians(index, groups, self.config.token_weighting, keep=static)

    def _staircase(self) -> list[LayerPlan]:
        """Row losses and sensitivity of all layers (stored), then one budget over them."""
        with self._timed("plan"):
            layers = (self.statistics or self.streamed).layers[: len(self.layers)]
            curves = self._curves([layer.groups for layer in layers])
            with phase("widths"):
                return staircase_plans(
                    list(self.layers),
                    [layer.groups for layer in layers],
                    curves,
                    self.curvature.gradients.sensitivity,
                    [self.name(i) for i in range(len(self.layers))],
                    self.config,
                )

    def _curves(self, groups: list[list[Group]]) -> list[dict]:
        """Row losses of every layer, from the statistics, the store, or made and kept in both."""
        known = {} if self.statistics is None else self.statistics.curves
        key = self.config.curves_key()
        if key in known:
            return known[key]
        curves, walk = [], None
        if self.statistics is None:
            walk = LayerWalk(self.model, self.calibration, self.device, self.batch)
        self.progress.start("row losses", len(self.layers))
        for first in range(0, len(self.layers), self.at_once):
            chunk = range(first, min(first + self.at_once, len(self.layers)))
            found = {index: self.store.get(f"curves_{index:04d}") for index in chunk}
            missing = [index for index in chunk if found[index] is None]
            if walk is None:
                hessians = [self.statistics.layers[index].hessians for index in missing]
            else:  # one layer at a time
                with walk.on_device(first):
                    if missing:
                        weighting = self.config.token_weighting
                        hessians = [walk.hessians(first, groups[first], weighting)]
                    else:
                        hessians = walk.forward(first) or []
            with phase("row losses"):
                made = layer_curves(
                    [self.layers[index] for index in missing],
                    [groups[index] for index in missing],
                    hessians,
                    self.curvature,
                    self.device,
                    [self.name(index) for index in missing],
                )
            for index, curve in zip(missing, made, strict=True):
                self.store.put(f"curves_{index:04d}", curve)
                found[index] = curve
            curves += [found[index] for index in chunk]
            self.progress.advance(len(chunk))
        self.progress.finish()
        known[key] = curves
        return curves

    def _curvature(self) -> Curvature:
        """What the backward pass tells, from the statistics, the store, or made and stored."""
        gradients = None
        if self.config.needs_gradients and self.statistics is not None:
            gradients = self.statistics.gradients
        elif self.config.needs_gradients:
            with self._timed("sensitivity"), phase("sensitivity"):
                gradients = self._streamed_gradients()
        return Curvature(gradients, self.calibration.numel(), self.config)

    def _streamed_gradients(self) -> Gradients:
        """Groups and gradients without Hessians, for models whose Hessians do not fit."""
        walk = LayerWalk(self.model, self.calibration[:1], self.device, 1)
        layers = []
        for index in range(len(self.layers)):
            with walk.on_device(index):
                layers.append(LayerStatistics(walk.find_groups(index, self.config.skip), {}))
                walk.forward(index)
        self.streamed = statistics = Statistics(layers, self.config.token_weighting)
        found = self.store.get("sensitivity")
        if found is None:
            add_gradients(
                statistics, self.model, self.calibration, self.config, self.progress, self.device
            )
            self.store.put("sensitivity", vars(statistics.gradients))
        else:
            statistics.gradients = Gradients(**found)
        return statistics.gradients

    def _record(self, index: int, modules: dict[str, PrunedModule]) -> None:
        for name, pruned in modules.items():
            split, full = pruned.split, self.name(index) + name
            self.report.modules.append(
                ModuleReport(
                    full,
                    split.n,
                    split.k,
                    pruned.error,
                    split.widths,
                    split.k_shards,
                    split.dense_fraction,
                    pruned.damping,
                    pruned.dead_inputs,
                    pruned.refit_damping,
                )
            )
            if pruned.damping > self.config.damping:
                self.report.notes.append(
                    f"{full}: singular Hessian, damping raised to {pruned.damping:g}"
                )
            if pruned.refit_damping > DAMPING:
                self.report.notes.append(
                    f"{full}: nearly singular Hessian, damping of the refit raised to "
                    f"{pruned.refit_damping:g}"
                )
            if pruned.dead_inputs:
                self.report.notes.append(f"{full}: {pruned.dead_inputs} dead inputs")


def _check_weights(model: nn.Module, prefix: str, extra: tuple[str, ...]) -> None:
    outside_modules(model, prefix, extra)
    for name, module in model.named_modules():
        asked = name.startswith(prefix + ".") or name in extra
        if (
            asked
            and isinstance(module, nn.Linear)
            and not bool(torch.isfinite(module.weight).all())
        ):
            raise PruneError(f"prune_model: {name}.weight has NaN or Inf")
