# SPDX-License-Identifier: Apache-2.0
"""Loss of a causal LM over token windows, with a softmax over the tokens that occur in the text.

The reduced softmax saves most of the head's time and shifts every row of the table alike.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from spense_kernels.prune import Statistics
from spense_kernels.prune.calibrate import LayerWalk
from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.hessian import accumulate, symmetrize, token_weights
from spense_kernels.prune.statistics import (
    LayerStatistics,
    Quiet,
    add_gradients,
    describe_calibration,
)


@torch.inference_mode()
def window_losses(model, windows: Tensor, vocabulary: Tensor, device="cpu") -> list[float]:
    """Mean next-token loss in nats of each window, softmax over `vocabulary` (sorted ids)."""
    head = model.lm_head.weight[vocabulary.to(model.lm_head.weight.device)].to(device)
    labels = torch.searchsorted(vocabulary, windows[:, 1:].contiguous()).to(device)
    out = []
    for index, ids in enumerate(windows):
        hidden = model.model(input_ids=ids[None].to(device), use_cache=False).last_hidden_state
        logits = (hidden[0, :-1].to(head.dtype) @ head.T).float()
        out.append(float(torch.nn.functional.cross_entropy(logits, labels[index])))
    return out


def both_statistics(model, calibration: Tensor, device="cpu") -> dict[str, Statistics]:
    """Statistics with and without token weighting from one forward pass, and sensitivity."""
    walk = LayerWalk(model, calibration, device)
    layers: dict[str, list[LayerStatistics]] = {"none": [], "norm": []}
    begin = time.monotonic()
    for index in range(len(walk.layers)):
        with walk.on_device(index) as layer:
            groups = walk.find_groups(index)
            weighted, handles = {}, []
            for group in groups:
                if group.norm_follows:
                    weighted[group.name] = torch.zeros(group.k, group.k, device=device)
                    hook = _weighted(weighted[group.name])
                    module = layer.get_submodule(group.name)
                    handles.append(module.register_forward_hook(hook))
            plain = walk.hessians(index, groups, "none")
            for handle in handles:
                handle.remove()
        plain = {name: h.cpu() for name, h in plain.items()}
        normed = {name: symmetrize(h).cpu() for name, h in weighted.items()}
        layers["none"].append(LayerStatistics(groups, plain))
        layers["norm"].append(LayerStatistics(groups, {**plain, **normed}))
        print(f"  layer {index} {time.monotonic() - begin:.0f} s", flush=True)
    found = {}
    for weighting, collected in layers.items():
        note = describe_calibration(calibration)
        found[weighting] = Statistics(collected, weighting, calibration=note)
    config = PruneConfig(strategy="staircase")
    add_gradients(found["norm"], model, calibration, config, Quiet(), device)
    print(f"  sensitivity {time.monotonic() - begin:.0f} s", flush=True)
    return found


def _weighted(hessian: Tensor):
    def hook(module, args, output):
        accumulate(hessian, args[0].flatten(0, -2), token_weights(output).flatten())

    return hook


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    spread = math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(spread / len(values))
