# SPDX-License-Identifier: Apache-2.0
"""From a layer and its plan to problems for `compress`, and from solutions to pruned modules."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spense_kernels.prune.compress import Solution
from spense_kernels.prune.groups import Group
from spense_kernels.prune.hessian import permuted
from spense_kernels.prune.install import PrunedModule
from spense_kernels.prune.order import Problem
from spense_kernels.prune.plan import Curvature, LayerPlan, shards_of


@dataclass
class Task:
    """One group of projections of one layer.

    Attributes:
        index: of the layer.
        biases: [N_i] or None each.
        columns: int64 [K] where the plan moved the group's columns: their places before.
        result: filled in by `finish`.
    """

    index: int
    group: Group
    problem: Problem
    biases: list[Tensor | None]
    columns: Tensor | None = None
    result: dict[str, PrunedModule] = field(default_factory=dict)

    def finish(self, solution: Solution) -> None:
        """Pruned modules by name, on the CPU."""
        dead = int(self.problem.dead.sum())
        for i, name in enumerate(self.group.modules):
            weight, scale, bias = solution.weights[i], None, self.biases[i]
            if solution.scales is not None:
                scale = solution.scales[i].cpu()
                codes = (weight / solution.scales[i][:, None]).to(torch.float8_e4m3fn)
                codes = codes.view(torch.uint8)
                weight = torch.where(codes == 0x80, 0, codes)  # -0 counts as zero
            self.result[name] = PrunedModule(
                weight.cpu(),
                scale,
                None if bias is None else bias.cpu(),
                solution.k_perm,
                self.problem.widths[i],
                solution.errors[i],
                solution.damping,
                dead,
                solution.refit_damping,
            )


def layer_tasks(
    index: int,
    layer: nn.Module,
    groups: list[Group],
    hessians: dict[str, Tensor],
    plan: LayerPlan,
    curvature: Curvature,
    prefix: str,
    device,
) -> list[Task]:
    """Problems of a layer on the compute device, rows and columns moved by the plan."""
    rows = {name: order.to(device) for name, order in plan.row_order.items()}
    columns = {name: order.to(device) for name, order in plan.column_order.items()}
    found = []
    for group in groups:
        hessian = curvature.of(group, hessians, prefix, device)
        if group.name in columns:
            hessian = permuted(hessian, columns[group.name])
        moved = [_moved(layer.get_submodule(m), rows.get(m), columns.get(m), device)
                 for m in group.modules]  # fmt: skip
        weighting = [plan.row_weights[m].to(device) for m in group.modules if m in plan.row_weights]
        problem = Problem(
            prefix + group.name,
            [weight for weight, _ in moved],
            hessian,
            [plan.widths[name] for name in group.modules],
            shards_of(group, curvature.config),
            weighting or None,
        )
        biases = [bias for _, bias in moved]
        found.append(Task(index, group, problem, biases, columns.get(group.name)))
    return found


def _moved(module: nn.Linear, rows, columns, device) -> tuple[Tensor, Tensor | None]:
    weight = module.weight.detach().to(device)
    bias = None if module.bias is None else module.bias.detach().to(device)
    if rows is not None:
        weight = weight[rows]
        bias = None if bias is None else bias[rows]
    return (weight if columns is None else weight[:, columns]), bias


def alike(tasks: list[list[Task]]) -> list[list[Task]]:
    """The same group of all layers together where shapes agree, else one by one."""
    if not tasks:
        return []

    def shapes(of_layer):
        return [[w.shape for w in task.problem.weights] for task in of_layer]

    if all(shapes(of_layer) == shapes(tasks[0]) for of_layer in tasks):
        return [list(same) for same in zip(*tasks, strict=True)]
    return [[task] for of_layer in tasks for task in of_layer]
