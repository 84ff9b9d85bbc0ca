# SPDX-License-Identifier: Apache-2.0
"""Find the decoder layers of a model and, in a layer, which projections share an input.

Nothing here knows families by name: a projection's group and the norm that may follow it are read
off one forward pass, by the identity of the tensors.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spense_kernels.errors import PruneError


@dataclass(frozen=True)
class Group:
    """Projections of one decoder layer that read the same input.

    Attributes:
        modules: names inside the layer, in call order.
        k: input columns.
        norm_follows: the output of the only projection goes straight into a norm over its rows.
    """

    modules: tuple[str, ...]
    k: int
    norm_follows: bool = False

    @property
    def name(self) -> str:
        return self.modules[0]


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the outermost ModuleList with most linear weights.

    Raises PruneError when no ModuleList holds nn.Linear.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
            if size and all(_linears(layer) for layer in module):
                found.append((size, -name.count("."), name, module))
    if not found:
        raise PruneError(
            f"prune_model: {type(model).__name__} has no list of decoder layers made of nn.Linear "
            "(is it pruned already?)"
        )
    found.sort(key=lambda item: item[:2], reverse=True)
    return found[0][2], found[0][3]


def outside_modules(model: nn.Module, prefix: str, names: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The named nn.Linear outside the decoder layers, whose list is called `prefix`.

    Raises PruneError for a name that is none.
    """
    known = dict(model.named_modules())
    found = {}
    for name in names:
        module = known.get(name)
        if not isinstance(module, nn.Linear) or name.startswith(prefix + "."):
            raise PruneError(
                f"PruneConfig.modules: {name!r} must name an nn.Linear outside {prefix}, got "
                f"{type(module).__name__ if name in known else 'no such module'}"
            )
        found[name] = module
    return found


def _linears(layer: nn.Module) -> list[str]:
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


class GroupProbe:
    """Hooks on one layer that watch which tensors go where; use as a context manager.

    After one forward pass inside it, `groups()` tells what was seen.
    """

    def __init__(self, layer: nn.Module, skip: tuple[str, ...] = (), prefix: str = ""):
        self._prefix = prefix
        self._linears = {
            name: module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and not any(part in prefix + name for part in skip)
        }
        self._norms = [m for m in layer.modules() if "norm" in type(m).__name__.lower()]
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._normed: list[Tensor] = []
        self._handles: list = []

    def __enter__(self) -> GroupProbe:
        for name, module in self._linears.items():
            self._handles.append(module.register_forward_hook(self._see(name)))
        for norm in self._norms:
            self._handles.append(norm.register_forward_pre_hook(self._see_norm))
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()

    def _see(self, name: str):
        def hook(module, args, output):
            self._inputs.setdefault(name, args[0])
            self._outputs.setdefault(name, output)

        return hook

    def _see_norm(self, module, args):
        self._normed.append(args[0])

    def groups(self) -> list[Group]:
        """Groups in call order.

        Raises PruneError when a projection was never called (its input is unknown).
        """
        missing = sorted(set(self._linears) - set(self._inputs))
        if missing:
            raise PruneError(
                f"prune_model: {self._prefix}{missing[0]} was not called in a forward pass of its "
                "layer; name it in PruneConfig.skip"
            )
        shared: list[tuple[Tensor, list[str]]] = []
        for name, tensor in self._inputs.items():
            for other, names in shared:
                if other is tensor:
                    names.append(name)
                    break
            else:
                shared.append((tensor, [name]))
        return [self._group(names) for _, names in shared]

    def _group(self, names: list[str]) -> Group:
        k = self._linears[names[0]].in_features
        follows = len(names) == 1 and any(self._outputs[names[0]] is t for t in self._normed)
        return Group(tuple(names), k, follows)


@torch.no_grad()
def model_groups(model: nn.Module, skip: tuple[str, ...] = ()) -> list[list[Group]]:
    """Groups of every decoder layer, seen in one forward pass of two tokens.

    Raises PruneError when the model has no such layers or a projection is never called.
    """
    prefix, layers = decoder_layers(model)
    device = model.get_input_embeddings().weight.device
    with ExitStack() as stack:
        probes = [
            stack.enter_context(GroupProbe(layer, skip, f"{prefix}.{index}."))
            for index, layer in enumerate(layers)
        ]
        model(input_ids=torch.tensor([[0, 1]], device=device), use_cache=False)
    return [probe.groups() for probe in probes]
