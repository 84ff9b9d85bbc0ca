# SPDX-License-Identifier: Apache-2.0
"""prune_model: plan, prune and install layer by layer, with finished layers kept on disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spense_kernels.errors import PruneError
from spense_kernels.prune.calibrate import LayerWalk, check_calibration
from spense_kernels.prune.compress import Problem, Solution, compress
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.groups import Group, decoder_layers
from spense_kernels.prune.hessian import dead_inputs, permuted
from spense_kernels.prune.install import PrunedModule, install, replace_weights
from spense_kernels.prune.plan import (
    LayerPlan,
    layer_curves,
    seeded,
    shards_of,
    staircase_plans,
    uniform_plan,
)
from spense_kernels.prune.reorder import gated_pairs
from spense_kernels.prune.report import ModuleReport, PruneReport
from spense_kernels.prune.statistics import (
    LayerStatistics,
    Quiet,
    Statistics,
    add_sensitivity,
    check_statistics,
    describe_calibration,
)
from spense_kernels.prune.store import Store, model_fingerprint

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
    batch: int = 4,
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
        batch: sequences a forward pass.
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
    return run.prune(on_layer)


class _Run:
    def __init__(self, model, calibration, config, statistics, progress, work_dir, device, batch):
        check_calibration(calibration)
        self.model, self.calibration, self.config = model, calibration, config
        self.statistics = statistics
        self.progress = progress or Quiet()
        self.device = torch.device(device)
        self.batch, self.at_once = batch, 1
        self.prefix, self.layers = decoder_layers(model)
        self.report = PruneReport(config, calibration=describe_calibration(calibration))
        _check_weights(self.prefix, self.layers)
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
        return f"{self.prefix}.{index}."

    @contextmanager
    def _timed(self, stage: str):
        begin = time.monotonic()
        yield
        seconds = self.report.seconds
        seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - begin

    def prune(self, on_layer: LayerCallback) -> PruneReport:
        plans = self._staircase() if self._is_staircase() else None
        walk = None
        if self.statistics is None:
            walk = LayerWalk(self.model, self.calibration, self.device, self.batch)
        self.progress.start("prune", len(self.layers))
        for first in range(0, len(self.layers), self.at_once):
            chunk = range(first, min(first + self.at_once, len(self.layers)))
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
                layer = self.layers[index]
                plan = plans[index] if plans else uniform_plan(layer, groups, self.config)
                tasks.append(self._tasks(index, groups, hessians, plan))
            else:
                self.report.notes.append(f"{self.name(index)}: taken from work_dir")
        with self._timed("prune"):
            for layer_tasks in _alike(tasks):
                names = [task.problem.name for task in layer_tasks]
                problems = [task.problem for task in layer_tasks]
                seeds = [seeded(self.config, name) for name in names]
                for task, solution in zip(
                    layer_tasks, compress(problems, self.config, seeds), strict=True
                ):
                    task.result = _modules(task, solution)
        for layer_tasks in tasks:
            index = layer_tasks[0].index
            modules = {name: m for task in layer_tasks for name, m in task.result.items()}
            stored[index] = {name: vars(m) for name, m in modules.items()}
            self.store.put(f"layer_{index:04d}", stored[index])

    def _put(self, index: int, stored: dict, walk, on_layer: LayerCallback) -> None:
        layer = self.layers[index]
        modules = {name: PrunedModule(**fields) for name, fields in stored.items()}
        if walk is not None and self.config.calibration == "sequential":
            replace_weights(layer, modules)
            with walk.on_device(index):
                walk.forward(index)
        on_layer(layer, modules)
        self._record(index, modules)
        self.progress.advance()

    def _is_staircase(self) -> bool:
        return self.config.strategy == "staircase" and 0.0 < self.config.dense_fraction < 1.0

    def _statistics_of(self, index: int, walk: LayerWalk | None, needed: bool):
        if self.statistics is not None:
            layer = self.statistics.layers[index]
            return layer.groups, layer.hessians
        static = self.config.calibration == "static"
        with self._timed("calibrate"), walk.on_device(index):
            if not needed:
                if static:
                    walk.forward(index)
                return None, None
            groups = walk.find_groups(index, self.config.skip)
            return groups, walk.hessians(index, groups, self.config.token_weighting, keep=static)

    def _staircase(self) -> list[LayerPlan]:
        """Row losses and sensitivity of all layers (stored), then one budget over them."""
        with self._timed("plan"):
            statistics = self.statistics or self._streamed_sensitivity()
            curves, walk = [], None
            self.progress.start("row losses", len(self.layers))
            for index, layer in enumerate(self.layers):
                found = self.store.get(f"curves_{index:04d}")
                if self.statistics is None:
                    walk = walk or LayerWalk(self.model, self.calibration, self.device, self.batch)
                if found is None or walk is not None:
                    groups, hessians = statistics.layers[index].groups, None
                    if walk is None:
                        hessians = statistics.layers[index].hessians
                    else:
                        with walk.on_device(index):
                            hessians = walk.hessians(index, groups, self.config.token_weighting)
                if found is None:
                    found = layer_curves(
                        layer, groups, hessians, self.config, self.device, self.name(index)
                    )
                    self.store.put(f"curves_{index:04d}", found)
                curves.append(found)
                self.progress.advance()
            self.progress.finish()
            return staircase_plans(
                list(self.layers),
                [layer.groups for layer in statistics.layers],
                curves,
                statistics.sensitivity,
                [self.name(i) for i in range(len(self.layers))],
                self.config,
            )

    def _streamed_sensitivity(self) -> Statistics:
        """Groups and sensitivity without Hessians, for models whose Hessians do not fit."""
        walk = LayerWalk(self.model, self.calibration[:1], self.device, 1)
        layers = []
        for index in range(len(self.layers)):
            with walk.on_device(index):
                layers.append(LayerStatistics(walk.find_groups(index, self.config.skip), {}))
                walk.forward(index)
        statistics = Statistics(layers, self.config.token_weighting)
        found = self.store.get("sensitivity")
        if found is None:
            add_sensitivity(
                statistics, self.model, self.calibration, self.config, self.progress, self.device
            )
            self.store.put("sensitivity", statistics.sensitivity)
        else:
            statistics.sensitivity = found
        return statistics

    def _tasks(
        self, index: int, groups: list[Group], hessians: dict[str, Tensor], plan: LayerPlan
    ) -> list[_Task]:
        rows, columns = {}, {}
        for pair in gated_pairs(self.layers[index], groups):
            if pair.gate in plan.row_order:
                order = plan.row_order[pair.gate].to(self.device)
                rows[pair.gate] = rows[pair.up] = columns[pair.down] = order
        return [self._task(index, g, hessians[g.name], plan, rows, columns) for g in groups]

    def _task(self, index, group: Group, hessian: Tensor, plan, rows, columns) -> _Task:
        layer = self.layers[index]
        hessian = hessian.to(self.device)
        weights, biases = [], []
        for name in group.modules:
            module = layer.get_submodule(name)
            weight, bias = module.weight.detach().to(self.device), module.bias
            bias = None if bias is None else bias.detach().to(self.device)
            if name in rows:
                weight = weight[rows[name]]
                bias = None if bias is None else bias[rows[name]]
            if name in columns:
                weight = weight[:, columns[name]]
            weights.append(weight)
            biases.append(bias)
        if group.name in columns:
            hessian = permuted(hessian, columns[group.name])
        weighting = [plan.row_weights[m].to(self.device) for m in group.modules
                     if m in plan.row_weights]  # fmt: skip
        problem = Problem(
            self.name(index) + group.name,
            weights,
            hessian,
            [plan.widths[name] for name in group.modules],
            shards_of(group, self.config),
            weighting or None,
        )
        return _Task(index, group, problem, biases)

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
                )
            )
            if pruned.damping > self.config.damping:
                self.report.notes.append(
                    f"{full}: singular Hessian, damping raised to {pruned.damping:g}"
                )
            if pruned.dead_inputs:
                self.report.notes.append(f"{full}: {pruned.dead_inputs} dead inputs")


@dataclass
class _Task:
    index: int
    group: Group
    problem: Problem
    biases: list[Tensor | None]
    result: dict[str, PrunedModule] = field(default_factory=dict)


def _alike(tasks: list[list[_Task]]) -> list[list[_Task]]:
    """The same group of all layers together where shapes agree, else one by one."""
    if not tasks:
        return []

    def shapes(layer_tasks):
        return [[w.shape for w in task.problem.weights] for task in layer_tasks]

    if all(shapes(layer_tasks) == shapes(tasks[0]) for layer_tasks in tasks):
        return [list(same) for same in zip(*tasks, strict=True)]
    return [[task] for layer_tasks in tasks for task in layer_tasks]


def _modules(task: _Task, solution: Solution) -> dict[str, PrunedModule]:
    dead = int(dead_inputs(task.problem.hessian).sum())
    found = {}
    for i, name in enumerate(task.group.modules):
        weight, scale, bias = solution.weights[i], None, task.biases[i]
        if solution.scales is not None:
            scale = solution.scales[i].cpu()
            codes = (weight / solution.scales[i][:, None]).to(torch.float8_e4m3fn)
            codes = codes.view(torch.uint8)
            weight = torch.where(codes == 0x80, 0, codes)  # -0 counts as zero
        found[name] = PrunedModule(
            weight.cpu(),
            scale,
            None if bias is None else bias.cpu(),
            solution.k_perm,
            task.problem.widths[i],
            solution.errors[i],
            solution.damping,
            dead,
        )
    return found


def _check_weights(prefix: str, layers) -> None:
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and not bool(torch.isfinite(module.weight).all()):
                raise PruneError(f"prune_model: {prefix}.{index}.{name}.weight has NaN or Inf")
