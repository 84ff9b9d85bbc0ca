# SPDX-License-Identifier: Apache-2.0
"""Walk a model layer by layer over calibration tokens; collect Hessians on the way.

One decoder layer is on the compute device at a time; the hidden states between layers wait on the
CPU (or on the compute device where the model lives there anyway).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from spense_kernels.errors import PruneError
from spense_kernels.prune.groups import Group, GroupProbe, decoder_layers, outside_modules
from spense_kernels.prune.hessian import accumulate, check_finite, symmetrize, token_weights
from spense_kernels.prune.norms import fast_norms

_GPU_TOKENS = 1 << 14  # of a forward pass that is not of all
# Of a GPU's memory, for each token and column of the hidden states, above which not all tokens go
# in one pass: a layer with its backward pass and the sums over it take about a third of that.
_ONE_PASS_BYTES = 640
_PROBED = 4  # sequences that tell which projections share an input


class Stop(Exception):
    """Ends a forward pass that has shown what was wanted."""


def check_calibration(calibration: Tensor) -> None:
    """Raise PruneError unless calibration is int64 [S >= 1, L >= 2]."""
    good = isinstance(calibration, Tensor) and calibration.dtype == torch.int64
    if not good or calibration.dim() != 2 or calibration.shape[0] < 1 or calibration.shape[1] < 2:
        got = calibration
        if isinstance(got, Tensor):
            got = f"{got.dtype} {list(got.shape)}"
        raise PruneError(f"prune: calibration must be int64 [S >= 1, L >= 2] token ids, got {got}")


def batch_size(calibration: Tensor, hidden: int, device) -> int:
    """Sequences of [S, L] in a forward pass.

    On a GPU the launches of a short pass take longer than what they launch; all tokens go in one
    pass where there is plenty of room.

    Args:
        hidden: columns of the hidden states.
    """
    if torch.device(device).type != "cuda":
        return 4
    memory = torch.cuda.get_device_properties(device).total_memory
    if calibration.numel() * hidden * _ONE_PASS_BYTES <= memory:
        return len(calibration)
    return max(4, _GPU_TOKENS // calibration.shape[1])


@contextmanager
def overridden(layers, make):
    """Replace forward of every layer by make(index, layer) for a while."""
    saved = []
    for index, layer in enumerate(layers):
        saved.append(layer.__dict__.get("forward"))
        layer.forward = make(index, layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, saved, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def move(value: Any, device) -> Any:
    """Tensors inside tuples, lists and dicts to a device; everything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(move(v, device) for v in value)
    if isinstance(value, dict):
        return {key: move(v, device) for key, v in value.items()}
    return value


class LayerWalk:
    """Calibration tokens on their way through the decoder layers.

    Attributes:
        prefix: name of the list of layers.
        layers: the layers.
        hidden: inputs of the layer that comes next, one tensor [B, L, hidden] a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Tensor,
        device="cpu",
        batch: int | None = None,
        prefix: str | None = None,
    ):
        """`prefix` names the layers of a model whose projections are no nn.Linear any more."""
        check_calibration(calibration)
        if prefix is None:
            self.prefix, self.layers = decoder_layers(model)
        else:
            self.prefix, self.layers = prefix, model.get_submodule(prefix)
        self.device = torch.device(device)
        self.hidden: list[Tensor] = []
        self._arguments: dict[int, list] = {}
        self._ids: list[Tensor] = []
        self._home = next(self.layers[0].parameters()).device
        self._tuple_out = False
        columns = model.get_input_embeddings().weight.shape[1]
        batch = batch or batch_size(calibration, columns, device)
        with torch.no_grad():
            for ids in calibration.split(batch):
                self.hidden.append(self._embed(model, ids))
                self._ids.append(ids.to(model.get_input_embeddings().weight.device))
            if batch > _PROBED:
                self._embed(model, calibration[:_PROBED])

    def _embed(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Inputs of the first layer; also records what every layer is called with beside them.

        No layer computes anything.
        """
        calls: list = []
        first: list[Tensor] = []
        vocabulary = model.get_input_embeddings()

        def make(index, layer):
            def record(*args, **kwargs):
                hidden = args[0] if args else kwargs.pop("hidden_states")
                if index == 0:
                    first.append(hidden.to(self._home))
                calls.append((args[1:], kwargs))
                if index == len(self.layers) - 1:
                    raise Stop
                return hidden

            return record

        wrong = ids[(ids < 0) | (ids >= vocabulary.weight.shape[0])]
        if wrong.numel():
            raise PruneError(
                f"prune: calibration must hold tokens 0..{vocabulary.weight.shape[0] - 1}, "
                f"got {int(wrong[0])}"
            )
        with overridden(self.layers, make), suppress(Stop):
            model(input_ids=ids.to(vocabulary.weight.device), use_cache=False)
        self._arguments.setdefault(ids.shape[0], calls)
        return first[0]

    def name(self, index: int) -> str:
        return f"{self.prefix}.{index}."

    @contextmanager
    def on_device(self, index: int) -> Iterator[nn.Module]:
        """The layer on the compute device, back home afterwards."""
        layer = self.layers[index]
        layer.to(self.device)
        try:
            with fast_norms(layer):
                yield layer
        finally:
            layer.to(self._home)

    def call(self, index: int, hidden: Tensor) -> Tensor:
        """Forward of one batch; hidden [B, L, hidden] on the compute device."""
        args, kwargs = self._arguments[hidden.shape[0]][index]
        args, kwargs = move(args, self.device), move(kwargs, self.device)
        out = self.layers[index](hidden, *args, **kwargs)
        self._tuple_out = not isinstance(out, Tensor)
        return out[0] if self._tuple_out else out

    def as_output(self, hidden: Tensor):
        """`hidden` in the form that layers of this model return."""
        return (hidden,) if self._tuple_out else hidden

    @torch.no_grad()
    def forward(self, index: int, keep: bool = True) -> None:
        """Run the layer over all batches; its outputs become the next inputs when `keep`."""
        for i, hidden in enumerate(self.hidden):
            out = self.call(index, hidden.to(self.device))
            if keep:
                self.hidden[i] = out.to(self._home)

    @torch.no_grad()
    def find_groups(self, index: int, skip: tuple[str, ...] = ()) -> list[Group]:
        """Groups of projections of this layer, by a forward pass of few sequences."""
        with GroupProbe(self.layers[index], skip, self.name(index)) as probe:
            self.call(index, self.hidden[0][:_PROBED].to(self.device))
        return probe.groups()

    def hessians(
        self, index: int, groups: list[Group], weighting: str = "norm", keep: bool = True
    ) -> dict[str, Tensor]:
        """Forward pass that accumulates H float32 [K, K] of every group, by the group's name.

        Args:
            weighting: "norm" weights tokens by 1 / mean(y^2) where a norm follows.
            keep: whether the outputs become the next layer's inputs.

        Raises PruneError naming the projection whose input has NaN or Inf.
        """
        layer = self.layers[index]
        sums, handles = {}, []
        for group in groups:
            sums[group.name] = torch.zeros(group.k, group.k, device=self.device)
            hook = _accumulating(sums[group.name], weighting == "norm" and group.norm_follows)
            handles.append(layer.get_submodule(group.name).register_forward_hook(hook))
        try:
            self.forward(index, keep)
        finally:
            for handle in handles:
                handle.remove()
        for name, hessian in sums.items():
            check_finite(symmetrize(hessian), self.name(index) + name)
        return sums

    @torch.no_grad()
    def outside(
        self, model: nn.Module, names: tuple[str, ...]
    ) -> tuple[list[Group], dict[str, Tensor]]:
        """Groups and Hessians of modules that run behind the last layer (lm_head).

        Call it when every layer has been walked; the layers do not run again.
        """
        found = outside_modules(model, self.prefix, names)
        groups = [Group((name,), module.in_features) for name, module in found.items()]
        sums = {g.name: torch.zeros(g.k, g.k, device=self._home) for g in groups}
        seen: set[str] = set()

        def tap(name):
            def hook(module, args):
                accumulate(sums[name], args[0].flatten(0, -2).to(self._home))
                seen.add(name)
                if len(seen) == len(found):
                    raise Stop

            return hook

        handles = [m.register_forward_pre_hook(tap(name)) for name, m in found.items()]
        try:
            for ids, hidden in zip(self._ids, self.hidden, strict=True):
                seen.clear()
                with overridden(self.layers, self.passing(hidden)), suppress(Stop):
                    model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        for name, hessian in sums.items():
            check_finite(symmetrize(hessian), name)
        return groups, sums

    def passing(self, hidden: Tensor):
        """Layers that hand on their input, the last one `hidden`."""

        def make(index, layer):
            def skip(*args, **kwargs):
                given = args[0] if args else kwargs["hidden_states"]
                return self.as_output(hidden if index == len(self.layers) - 1 else given)

            return skip

        return make


def _accumulating(hessian: Tensor, weighted: bool):
    def hook(module, args, output):
        x = args[0].reshape(-1, args[0].shape[-1])
        weight = token_weights(output).reshape(-1) if weighted else None
        accumulate(hessian, x, weight)

    return hook
