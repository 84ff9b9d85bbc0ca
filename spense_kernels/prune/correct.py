# SPDX-License-Identifier: Apache-2.0
"""Prune layer by layer against what is already lost in front.

A layer of the pruned model reads other inputs than the same layer of the dense model: x_p in place
of x_d. Of all matrices the one whose outputs on x_p are closest to the dense model's W x_d is

    W' = W + W D (H + damping)^-1,   H = sum_t w_t x_p x_p^T,   D = sum_t w_t (x_d - x_p) x_p^T

(the damping holds W' near W). W' is what is pruned, under H.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from spense_kernels import ops
from spense_kernels.linear import rows_of
from spense_kernels.prune.calibrate import LayerWalk, Stop
from spense_kernels.prune.clock import phase
from spense_kernels.prune.compress import compress
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.hessian import (
    accumulate,
    add_product,
    check_finite,
    damped_factor,
    shrunk,
    symmetrize,
    token_weights,
)
from spense_kernels.prune.install import PrunedModule, shallow_clone
from spense_kernels.prune.plan import seeded
from spense_kernels.prune.sensitivity import Gradients
from spense_kernels.prune.stand_in import stand_in
from spense_kernels.prune.tasks import Task


@dataclasses.dataclass
class _Seen:
    """What the dense model shows of a group's input.

    inputs: [B * L, K] a batch, in the pruned model's order of columns; norm: [S, L] weights of the
    tokens where a norm follows, else None.
    """

    inputs: list[Tensor] = dataclasses.field(default_factory=list)
    norm: list[Tensor] = dataclasses.field(default_factory=list)


class Corrector:
    """The dense model and the model pruned so far, side by side on the calibration tokens.

    Layers must come in order, each by `correct` or, where its result is known, by `advance`, and
    before `model` gets its result.

    Args:
        model: still dense.
        calibration: int64 [S, L]; with energies of the gradients only their sequences, the last.
        gradients: of the dense model, or None for plain token weights.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Tensor,
        config: PruneConfig,
        gradients: Gradients | None,
        device,
        batch: int | None,
    ):
        self.config, self.gradients = config, gradients
        self.energy = {}
        if gradients is not None and config.gradient_share > 0.0:
            self.energy = gradients.energy
        if self.energy:
            calibration = calibration[-len(next(iter(self.energy.values()))) :]
        self.shape = tuple(calibration.shape)
        self.dense = LayerWalk(model, calibration, device, batch)
        self.pruned = LayerWalk(shallow_clone(model), calibration, device, batch)
        self.device = self.dense.device

    @torch.no_grad()
    def correct(self, index: int, tasks: list[Task]) -> dict[str, PrunedModule]:
        """Pruned modules of a layer by name, on the columns' order and widths of its tasks.

        Their errors are against their own target W', under their own H. Raises PruneError for NaN
        or Inf in an input and for an H that no damping repairs.
        """
        with phase("dense model"), self.dense.on_device(index):
            seen = self._see(index, tasks)
        one = len(self.pruned.hidden) == 1
        with self.pruned.on_device(index):
            found = (self._in_one_pass if one else self._by_group)(index, tasks, seen)
        self.pruned.layers[index] = nn.Identity()
        return found

    def _in_one_pass(
        self, index: int, tasks: list[Task], seen: dict[str, _Seen]
    ) -> dict[str, PrunedModule]:
        """With all tokens in one batch: a forward pass that prunes each group as it gets there."""
        layer, found, handles = self.pruned.layers[index], {}, {}
        for task in tasks:

            def reached(module, args, output, task=task):
                name = task.group.name
                handles[name].remove()  # without FP8 it stays the same module
                found.update(self._pruned(index, task, seen.pop(name), args))
                return layer.get_submodule(name)(*args)

            module = layer.get_submodule(task.group.name)
            handles[task.group.name] = module.register_forward_hook(reached)
        try:
            with phase("pruned model"):
                self.pruned.forward(index)
        finally:
            for handle in handles.values():
                handle.remove()
        return found

    def _by_group(
        self, index: int, tasks: list[Task], seen: dict[str, _Seen]
    ) -> dict[str, PrunedModule]:
        """Batch after batch up to one group, which is pruned, then from the front to the next."""
        found: dict[str, PrunedModule] = {}
        for task in tasks:
            inputs = self._inputs(index, task)
            found.update(self._pruned(index, task, seen.pop(task.group.name), inputs))
        with phase("pruned model"):
            self.pruned.forward(index)
        return found

    def _pruned(
        self, index: int, task: Task, seen: _Seen, inputs: Iterable[Tensor]
    ) -> dict[str, PrunedModule]:
        """Pruned modules of a group, which stand in for it from here on."""
        problem = self._problem(index, task, seen, inputs)
        done = dataclasses.replace(task, problem=problem, result={})
        seeds = [seeded(self.config, problem.name)]
        done.finish(compress([problem], self.config, seeds)[0])
        stand_in(self.pruned.layers[index], done.result)
        return done.result

    @torch.no_grad()
    def advance(self, index: int, modules: dict[str, PrunedModule]) -> None:
        """Go past a layer whose pruned modules are known."""
        with self.dense.on_device(index):
            self.dense.forward(index)
        with self.pruned.on_device(index) as layer:
            stand_in(layer, modules)
            self.pruned.forward(index)
        self.pruned.layers[index] = nn.Identity()

    def _see(self, index: int, tasks: list[Task]) -> dict[str, _Seen]:
        """The dense layer's inputs, by group; its outputs become the next layer's."""
        layer, home = self.dense.layers[index], self.dense.hidden[0].device
        found, handles = {}, []
        for task in tasks:
            seen = found[task.group.name] = _Seen()
            weighted = self.config.token_weighting == "norm" and task.group.norm_follows

            def hook(module, args, output, seen=seen, columns=task.columns, weighted=weighted):
                x = args[0].flatten(0, -2)
                seen.inputs.append((x if columns is None else x[:, columns]).to(home))
                if weighted:
                    seen.norm.append(token_weights(output).flatten())

            handles.append(layer.get_submodule(task.group.name).register_forward_hook(hook))
        try:
            self.dense.forward(index)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _problem(self, index: int, task: Task, seen: _Seen, inputs: Iterable[Tensor]):
        """The task's problem with W' for W and the H that goes with it.

        Args:
            inputs: the pruned model's inputs [B, L, K] of the group, a batch at a time.
        """
        problem = task.problem
        with phase("moments"):
            hessians, shifts = self._moments(index, task, seen, inputs)
        one = len(hessians) == 1
        with phase("targets"):
            targets = self._targets(problem, hessians, shifts)
        return dataclasses.replace(
            problem, weights=targets, hessian=hessians[0] if one else hessians
        )

    def _targets(self, problem, hessians: list[Tensor], shifts: list[Tensor]) -> list[Tensor]:
        """W' float32 [N_i, K] of every module."""
        found = []
        for i, weight in enumerate(problem.weights):
            if i < len(hessians):
                check_finite(hessians[i], problem.name)
                _, factor, _ = damped_factor(hessians[i], self.config.damping, problem.name)
                shift = shifts[i]
            weight = weight.float()
            found.append(weight + weight @ shift @ factor.T @ factor)
        return found

    def _moments(
        self, index: int, task: Task, seen: _Seen, inputs: Iterable[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """H and D, one for all modules of the group or one each.

        Token weights sum to 1 before first tokens get what the loss reacts to them beyond it.
        """
        config, names = self.config, [self.dense.name(index) + m for m in task.group.modules]
        share = config.gradient_share if self.energy else 0.0
        plain = torch.cat(seen.norm) if seen.norm else torch.ones(self.shape, device=self.device)
        weights = [plain] if share < 1.0 else []
        if share:
            weights += [self.energy[name].to(self.device) for name in names]
        weights = [(w / w.sum().clamp_min(1e-30)).flatten() for w in weights]
        k = task.problem.k
        sums = torch.zeros(2, len(weights), k, k, device=self.device)
        firsts = self._accumulate(seen, inputs, weights, sums)
        for hessian in sums[0]:
            symmetrize(hessian)
        (first_d, first_p), sequences = firsts, self.shape[0]
        found = []
        for i, name in enumerate(names):
            moments = sums[:, 0] if share < 1.0 else sums[:, i]
            if 0.0 < share < 1.0:
                moments = moments.lerp(sums[:, 1 + i], share)
            if config.sinks and self.gradients is not None:
                mass = self.gradients.sinks[name].to(self.device).square().sum()
                # Sinks are inputs times the root of their weight.
                weight = mass / (first_d.square().sum() / sequences).clamp_min(1e-20) / sequences
                weighted = first_p * weight
                moments = moments.clone()
                moments[0].addmm_(first_p.T, weighted)
                moments[1].addmm_((first_d - first_p).T, weighted)
            found.append(moments)
            if self.gradients is None:
                break
        return [shrunk(m[0], config.shrinkage) for m in found], [m[1] for m in found]

    def _accumulate(self, seen: _Seen, inputs, weights: list[Tensor], sums: Tensor):
        """Add the moments to `sums`; first tokens float32 [S, K], dense and pruned."""
        firsts: list[tuple[Tensor, Tensor]] = []
        place, length = 0, self.shape[1]
        for x, x_d in zip(inputs, seen.inputs, strict=True):
            codes, scale = self._read(x)
            x_p, x_d = codes * scale[:, None], x_d.to(self.device)  # in float32, by the scale
            delta = (x_d - x_p).mul_(scale[:, None])
            for i, weight in enumerate(weights):
                weight = weight[place : place + len(x_p)]
                accumulate(sums[0, i], codes, weight * scale.square())
                add_product(sums[1, i], delta * weight[:, None], codes)
            # Copies: slices would keep all of the batch.
            first = x_d[::length].to(torch.float32, copy=True), x_p[::length].clone()
            firsts.append(first)
            place += len(x_p)
        return [torch.cat(part) for part in zip(*firsts, strict=True)]

    def _inputs(self, index: int, task: Task) -> Iterator[Tensor]:
        """The pruned layer's inputs [B, L, K] of a group, which it runs up to in every batch."""
        given: list[Tensor] = []

        def stop(module, args):
            given.append(args[0])
            raise Stop

        module = self.pruned.layers[index].get_submodule(task.group.name)
        handle = module.register_forward_pre_hook(stop)
        try:
            for hidden in self.pruned.hidden:
                with suppress(Stop):
                    self.pruned.call(index, hidden.to(self.device))
                yield given.pop()
        finally:
            handle.remove()

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x as a pruned projection reads it: codes [T, K] times a float32 scale [T] each."""
        if not self.config.fp8:
            x = x.flatten(0, -2)
            return x, torch.ones(len(x), device=x.device)
        codes, scale = ops.quantize_fp8(rows_of(x))
        return codes.bfloat16(), scale  # e4m3 is exact in it, and products are fast
