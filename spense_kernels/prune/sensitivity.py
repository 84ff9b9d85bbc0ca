# SPDX-License-Identifier: Apache-2.0
"""How much the model's loss reacts to an error at each output of each projection.

F_i = E_t[g_ti^2] with g = d loss / d y (the diagonal of the empirical Fisher matrix). Where y goes
straight into an RMSNorm, F_i = E_t[(g_ti rms(y_t))^2]: it belongs to Hessians whose tokens weigh
1 / mean(y_t^2). Taking E[g^2] there overrates such outputs by orders of magnitude, because tokens
with huge outputs have tiny gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spense_kernels.errors import PruneError
from spense_kernels.prune.calibrate import LayerWalk, overridden
from spense_kernels.prune.groups import Group

_LOGIT_ELEMENTS = 1 << 26  # logits held at a time


def output_sensitivity(
    model: nn.Module,
    calibration: Tensor,
    groups: list[list[Group]],
    *,
    device="cpu",
    weighting: str = "norm",
    stride: int = 1,
    advance=None,
) -> dict[str, Tensor]:
    """F float32 [N] of every projection, by its full name; one backward pass, layer by layer.

    Args:
        calibration: int64 [S, L]; about 16 sequences are enough.
        groups: the groups of every decoder layer.
        weighting: "norm" for the normalised form where a norm follows.
        stride: the loss takes every stride-th position (the head is a large share of the cost).
        advance: called after each layer.
    """
    walk = LayerWalk(model, calibration, device, batch=1)
    inputs = []
    for index in range(len(walk.layers)):
        inputs.append(list(walk.hidden))
        with walk.on_device(index):
            walk.forward(index)
    grads = [
        _head_gradient(model, walk, ids, hidden, stride)
        for ids, hidden in zip(calibration.split(1), walk.hidden, strict=True)
    ]
    found: dict[str, Tensor] = {}
    for index in reversed(range(len(walk.layers))):
        with walk.on_device(index) as layer:
            taps = _Taps(layer, groups[index], weighting)
            for i, hidden in enumerate(inputs[index]):
                grads[i] = _layer_gradient(walk, index, hidden, grads[i])
            taps.remove()
        inputs[index].clear()
        for name, value in taps.sums.items():
            if not bool(torch.isfinite(value).all()):
                raise PruneError(f"prune: the gradient at {walk.name(index)}{name} has NaN or Inf")
            found[walk.name(index) + name] = (value / taps.tokens[name]).cpu()
        if advance is not None:
            advance()
    return found


class _Taps:
    """Sums of squared gradients at the outputs of the projections of one layer."""

    def __init__(self, layer: nn.Module, groups: list[Group], weighting: str):
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._handles = []
        for group in groups:
            for name in group.modules:
                module = layer.get_submodule(name)
                hook = self._hook(name, weighting == "norm" and group.norm_follows)
                self._handles.append(module.register_forward_hook(hook))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, normalised: bool):
        def forward_hook(module, args, output):
            y = output.detach()

            def take(grad):
                g = grad.float().reshape(-1, grad.shape[-1]).square()
                if normalised:
                    g = g * y.float().reshape(g.shape).square().mean(dim=-1, keepdim=True)
                self.sums[name] = self.sums.get(name, 0) + g.sum(dim=0)
                self.tokens[name] = self.tokens.get(name, 0) + g.shape[0]

            output.register_hook(take)

        return forward_hook


def _layer_gradient(walk: LayerWalk, index: int, hidden: Tensor, grad: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = hidden.detach().to(walk.device).requires_grad_()
        out = walk.call(index, leaf)
        (result,) = torch.autograd.grad(out, leaf, grad.to(walk.device))
    return result.to(hidden.device)


def _head_gradient(model, walk: LayerWalk, ids: Tensor, hidden: Tensor, stride: int) -> Tensor:
    """Gradient of the summed next-token loss by the last layer's output."""
    leaf = hidden.detach().clone().requires_grad_()
    head = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    ids = ids.to(leaf.device)
    with torch.enable_grad(), overridden(walk.layers, walk.passing(leaf)):
        final = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        normed = final.detach().requires_grad_()
        rows = max(1, _LOGIT_ELEMENTS // head.weight.shape[0])
        positions = torch.arange(0, ids.shape[1] - 1, stride, device=ids.device)
        for part in positions.split(rows):
            logits = head(normed[0, part]).float()
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            loss = nn.functional.cross_entropy(logits, ids[0, part + 1], reduction="sum")
            loss.backward()
        (grad,) = torch.autograd.grad(final, leaf, normed.grad)
    return grad
