# SPDX-License-Identifier: Apache-2.0
"""How much the model's loss reacts to an error at each output of each projection.

With g = d loss / d y, an error e_i in row i adds about sum_t g_ti^2 (e_i x_t)^2 / 2 to the loss. It
is taken apart as F_i e_i H e_i^T: F_i = E_t[g_ti^2] (the diagonal of the Fisher matrix) and H with
token weights of mean 1. Two kinds of tokens would ruin that product and are kept apart:

* The first token of a sequence. Attention uses it as a sink, so all later tokens depend on it: up
  to 96 % of the squared gradient at k, v and down sits there. Its input is nearly the same vector
  in every sequence, so its error is one direction, which a weight in H removes; F leaves it out.
* A few tokens with gradients far above the rest: their weights stop at CLIP times the median.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spense_kernels.errors import PruneError
from spense_kernels.evaluate import logits_of
from spense_kernels.prune.calibrate import LayerWalk, batch_size, overridden
from spense_kernels.prune.groups import Group
from spense_kernels.prune.hessian import Shelf, accumulate, symmetrize, token_weights

CLIP = 20.0  # largest weight of a token over the median
_LOGIT_ELEMENTS = 1 << 26  # logits held at a time


@dataclass
class Gradients:
    """What one backward pass tells of the projections, by full module name.

    Attributes:
        sensitivity: F float32 [N].
        sinks: float32 [S, K], first inputs x of every sequence times the root of their weight:
            sinks.T @ sinks adds them to an H whose other tokens weigh 1 on average.
        norm_mean: mean of the norm weights 1 / mean(y^2) over tokens; 1 where no norm follows.
        hessians: float32 [K, K] = sum_t a_t x_t x_t^T / tokens, a_t the gradient weights (mean 1):
            the token's mean squared gradient to a power, cut at CLIP times the median, 0 for first
            tokens; empty unless asked for.
        energy: those weights, float32 [S, L]; empty like hessians.
        tokens: how many positions were seen.
    """

    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    sinks: dict[str, Tensor] = field(default_factory=dict)
    norm_mean: dict[str, float] = field(default_factory=dict)
    hessians: dict[str, Tensor] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0


def collect_gradients(
    model: nn.Module,
    calibration: Tensor,
    groups: list[list[Group]],
    *,
    device="cpu",
    stride: int = 1,
    batch: int = 1,
    hessians: bool = False,
    power: float = 1.0,
    labels: str = "model",
    seed: int = 0,
    advance=None,
) -> Gradients:
    """One backward pass, layer by layer.

    Args:
        calibration: int64 [S, L]; about 16 sequences are enough without `hessians`.
        groups: the groups of every decoder layer.
        stride: the loss takes every stride-th position (the head is a large share of the cost).
        batch: sequences whose gradients are cut together, see CLIP.
        hessians: also accumulate gradient-weighted Hessians.
        power: of a token's mean squared gradient in its weight there.
        labels: next tokens of the loss: "model" draws them from the model's own predictions (the
            Fisher matrix proper), "text" takes the text's.
        seed: of the drawing.
        advance: called after each layer.
    """
    # Passes of several batches at once, where that takes less time.
    columns = model.get_input_embeddings().weight.shape[1]
    size = batch * max(1, batch_size(calibration, columns, device) // batch)
    walk = LayerWalk(model, calibration, device, size)
    generator = None
    if labels == "model":
        generator = torch.Generator(device=walk.hidden[0].device).manual_seed(seed)
    inputs = []
    for index in range(len(walk.layers)):
        inputs.append(list(walk.hidden))
        with walk.on_device(index):
            walk.forward(index)
    grads = [
        _head_gradient(model, walk, ids, hidden, stride, generator)
        for ids, hidden in zip(calibration.split(size), walk.hidden, strict=True)
    ]
    found, shelf = Gradients(tokens=calibration.numel()), Shelf(device)
    for index in reversed(range(len(walk.layers))):
        with walk.on_device(index) as layer:
            taps = _Taps(layer, groups[index], batch, power if hessians else None)
            for i, hidden in enumerate(inputs[index]):
                grads[i] = _layer_gradient(walk, index, hidden, grads[i])
            taps.finish(found, walk.name(index), shelf)
        inputs[index].clear()
        if advance is not None:
            advance()
    return found


class _Sums:
    """Running sums over the tokens of one projection."""

    def __init__(self):
        self.squares = self.mass = self.norm = self.hessian = 0.0
        self.tokens = self.later = 0
        self.weight = 0.0  # of all tokens in `hessian`
        self.sinks: list[Tensor] = []
        self.energy: list[Tensor] = []


class _Taps:
    """Sums over the gradients at the outputs of the projections of one layer."""

    def __init__(self, layer: nn.Module, groups: list[Group], batch: int, power: float | None):
        self._batch = batch
        self._sums: dict[str, _Sums] = {}
        self._handles = []
        for group in groups:
            for name in group.modules:
                self._sums[name] = _Sums()
                hook = self._hook(self._sums[name], group.norm_follows, power)
                self._handles.append(layer.get_submodule(name).register_forward_hook(hook))

    def finish(self, found: Gradients, prefix: str, shelf: Shelf) -> None:
        """Remove the hooks and put the results into `found`, Hessians by way of the shelf."""
        tiny = torch.finfo(torch.float32).tiny
        for handle in self._handles:
            handle.remove()
        for name, sums in self._sums.items():
            if not bool(torch.isfinite(sums.squares).all()):
                raise PruneError(f"prune: the gradient at {prefix}{name} has NaN or Inf")
            mean, full = sums.mass / sums.later, prefix + name
            found.sensitivity[full] = (sums.squares / sums.later).cpu()
            sinks = torch.cat(sums.sinks) / (mean * sums.tokens).clamp_min(tiny).sqrt()
            found.sinks[full] = (sinks * (mean > 0)).cpu()
            found.norm_mean[full] = float(sums.norm) / sums.tokens
            if isinstance(sums.hessian, Tensor):
                weight = sums.weight.clamp_min(tiny)
                found.hessians[full] = shelf.put(symmetrize(sums.hessian).div_(weight))
                energy = torch.cat(sums.energy) * (sums.later / weight)
                found.energy[full] = nn.functional.pad(energy, (1, 0)).cpu()

    def _hook(self, sums: _Sums, norm_follows: bool, power: float | None):
        def forward_hook(module, args, output):
            x, y = args[0].detach(), output.detach()
            length = x.shape[-2]

            def take(grad):
                g = grad.float().reshape(-1, length, grad.shape[-1]).square()
                flat = x.reshape(-1, length, x.shape[-1])
                weight = g.mean(dim=-1)
                sums.sinks.append(flat[:, 0].float() * weight[:, :1].sqrt())
                later = weight[:, 1:]
                share = _kept_share(later, self._batch)
                sums.squares = sums.squares + (g[:, 1:] * share[..., None]).sum(dim=(0, 1))
                sums.mass = sums.mass + (later * share).sum()
                sums.tokens += weight.numel()
                sums.later += later.numel()
                norm = token_weights(y).sum() if norm_follows else float(weight.numel())
                sums.norm = sums.norm + norm
                if power is not None:
                    rows = flat[:, 1:].reshape(-1, x.shape[-1])
                    if not isinstance(sums.hessian, Tensor):
                        k = rows.shape[1]
                        sums.hessian = torch.zeros(k, k, device=rows.device)
                    energy = later.pow(power)
                    energy = energy * _kept_share(energy, self._batch)
                    accumulate(sums.hessian, rows, energy.reshape(-1))
                    sums.weight = sums.weight + energy.sum()
                    sums.energy.append(energy)

            output.register_hook(take)

        return forward_hook


def _kept_share(weight: Tensor, batch: int) -> Tensor:
    """What is left of each weight [S, L] when none may be above CLIP times the median of its batch.

    The median is of weights above 0: with a stride, most tokens of the last layer feel nothing. It
    comes from sorted rows, for torch.nanmedian makes the host wait for the GPU, thousands of times.
    """
    count, length = weight.shape
    # Zeros do not count, so they fill up the last batch.
    rows = nn.functional.pad(weight, (0, 0, 0, -count % batch)).view(-1, batch * length)
    ascending = torch.where(rows > 0, rows, torch.inf).sort(dim=1).values
    middle = ((rows > 0).sum(dim=1, keepdim=True) - 1).clamp_min(0) // 2
    limit = CLIP * ascending.gather(1, middle)
    share = torch.where(rows > limit, limit / rows.clamp_min(1e-45), 1.0)
    return share.view(-1, length)[:count]


def _layer_gradient(walk: LayerWalk, index: int, hidden: Tensor, grad: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = hidden.detach().to(walk.device).requires_grad_()
        out = walk.call(index, leaf)
        (result,) = torch.autograd.grad(out, leaf, grad.to(walk.device))
    return result.to(hidden.device)


def _head_gradient(
    model, walk: LayerWalk, ids: Tensor, hidden: Tensor, stride: int, generator
) -> Tensor:
    """Gradient of the summed next-token loss by the last layer's output.

    With a generator the next tokens are drawn from the model's own predictions.
    """
    leaf = hidden.detach().clone().requires_grad_()
    head = model.get_output_embeddings()
    ids = ids.to(leaf.device)
    with torch.enable_grad(), overridden(walk.layers, walk.passing(leaf)):
        final = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        normed = final.detach().requires_grad_()
        rows = max(1, _LOGIT_ELEMENTS // head.weight.shape[0])
        positions = torch.arange(0, ids.shape[1] - 1, stride, device=ids.device)
        for sequence in range(ids.shape[0]):
            for part in positions.split(rows):
                logits = logits_of(model, normed[sequence, part])
                wanted = ids[sequence, part + 1]
                if generator is not None:
                    chances = logits.detach().softmax(dim=-1)
                    wanted = torch.multinomial(chances, 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, wanted, reduction="sum").backward()
        (grad,) = torch.autograd.grad(final, leaf, normed.grad)
    return grad
