# SPDX-License-Identifier: Apache-2.0
"""How much loss each projection is expected to add at each dense share."""

from __future__ import annotations

from torch import nn

from spense_kernels.prune import PruneConfig, Statistics
from spense_kernels.prune.groups import decoder_layers, model_groups
from spense_kernels.prune.plan import Curvature, layer_curves, shards_of
from spense_kernels.prune.statistics import Quiet
from spense_kernels.prune.widths import width_list

SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)


def hessian_bytes(model: nn.Module, skip: tuple[str, ...] = ()) -> int:
    """What the Hessians of all layers take together, in float32."""
    return sum(4 * group.k**2 for groups in model_groups(model, skip) for group in groups)


def predicted_losses(
    model: nn.Module,
    calibration,
    statistics: Statistics | None,
    config: PruneConfig,
    device,
    progress=None,
) -> list[dict]:
    """Nats a token that each projection alone is expected to add, to second order.

    F_i e_i H e_i^T / 2 summed over rows, with the loss of the sweep alone: before the refit and
    FP8, columns dealt like a snake (docs/pruning.md). The first token and the largest gradients
    are left out of F. So it ranks projections well and predicts a sum only roughly.

    Returns a record a projection: `name`, `shares` (dense share reached, ascending) and `nats`.
    Empty without statistics that hold gradients.
    """
    if statistics is None or statistics.gradients is None:
        return []
    prefix, layers = decoder_layers(model)
    config = config.replace(strategy="staircase", widths=SHARES, dense_fraction=0.0, curves="sweep")
    curvature = Curvature(statistics.gradients, calibration.numel(), config)
    # The loss behind the gradients took every stride-th position.
    scale = 0.5 * config.sensitivity_stride
    progress = progress or Quiet()
    progress.start("expected losses", len(layers))
    found = []
    for index, layer in enumerate(layers):
        groups, full = statistics.layers[index].groups, f"{prefix}.{index}."
        hessians = [statistics.layers[index].hessians]
        curves = layer_curves([layer], [groups], hessians, curvature, device, [full])[0]
        for group in groups:
            size = group.k // shards_of(group, config)
            shares = [width / size for width in width_list(SHARES, size)]
            for name in group.modules:
                weight = statistics.gradients.sensitivity[full + name].double()
                nats = scale * (curves[name] * weight).sum(dim=1)
                found.append({"name": full + name, "shares": shares, "nats": nats.tolist()})
        progress.advance()
    progress.finish()
    return found
