# SPDX-License-Identifier: Apache-2.0
"""Puts the converted layers of a checkpoint into a model that transformers is loading."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from spense_kernels.checkpoint.reader import CheckpointReader
from spense_kernels.checkpoint.skeleton import check_linear
from spense_kernels.errors import CheckpointError
from spense_kernels.format import HybridWeight, Split
from spense_kernels.format.validate import TENSORS
from spense_kernels.layout import TILE_TABLE_COLUMNS
from spense_kernels.linear import SpenseLinear


class PendingLinear(SpenseLinear):
    """A SpenseLinear on meta whose buffers have their final sizes, before its weight is read.

    The sizes let transformers spread a model over devices; the state dict is empty, so that it
    does not look for these tensors. As buffers that are not persistent, it moves them to the device
    where the layer is to be.
    """

    def __init__(self, split: Split, bias: bool):
        super().__init__(split.k, split.n, bias, device="meta")
        sizes = {
            "w_packed": (split.packed_bytes,),
            "w_tiles": (split.tiles + 1, TILE_TABLE_COLUMNS),
            "k_gather": (split.k,),
            "w_scale": (split.n,),
            "bias": (split.n,),
        }
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.new_empty(sizes[name])
        self._is_hf_initialized = True

    def finish(self, weight: HybridWeight) -> None:
        """Becomes a plain SpenseLinear with this weight, where its buffers are."""
        device = self.w_packed.device
        self.w_packed = torch.empty(0, dtype=torch.uint8, device=device)
        self._set_weight(weight, device)
        del self._is_hf_initialized
        self.__class__ = SpenseLinear

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass


class LayerLoader:
    """Reads a checkpoint folder for one model: `prepare` before transformers loads, then `finish`.

    Raises CheckpointError for whatever is wrong with the checkpoint, naming the tensor.
    """

    def __init__(self, folder: Path):
        self.reader = CheckpointReader(folder)
        self.names: dict[str, str] = {}  # name in the checkpoint -> name in the model

    def prepare(self, model: nn.Module) -> None:
        """Swaps placeholders in (the model is on meta) and checks everything but the layers."""
        rename = self._renaming(model)
        for stored, entry in self.reader.config.modules.items():
            name = rename(stored)
            if name is None:
                continue
            check_linear(model, name, entry)
            model.set_submodule(name, PendingLinear(self.reader.split(stored), entry.bias))
            self.names[stored] = name
        # Our tensors are not unexpected, though transformers does not find them in the model. One
        # pattern, as transformers tries every one on every key.
        leaves = {re.escape(name.rpartition(".")[2]) for name in self.reader.config.modules}
        ours = rf"(^|\.)({'|'.join(sorted(leaves))})\.({'|'.join((*TENSORS, 'bias'))})$"
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = known | {ours}
        self._check_plain(model, rename)

    def finish(self, model: nn.Module) -> None:
        """Reads, checks and packs the layers one by one, each where transformers put it."""
        for stored, name in self.names.items():
            layer = model.get_submodule(name)
            if layer.w_packed.is_meta:
                raise CheckpointError(
                    f"from_pretrained: device_map: expected a device for {name}, got meta"
                )
            layer.finish(self.reader.layer(stored))

    def _renaming(self, model: nn.Module):
        """How names in the checkpoint become names in the model: a prefix more or less, or as is.

        The function returned gives None for what the model does not have (a head).
        """
        prefix = f"{model.base_model_prefix}."
        modules = self.reader.config.modules

        def strip(name: str) -> str | None:
            return name.removeprefix(prefix) if name.startswith(prefix) else None

        candidates = (lambda name: name, strip, lambda name: prefix + name)

        known = {name for name, _ in model.named_modules()}

        def hits(rename) -> int:
            return sum(rename(name) in known for name in modules)

        return max(candidates, key=hits)  # the first of the best

    def _check_plain(self, model: nn.Module, rename) -> None:
        """What transformers loads is there, of the right shape and undamaged."""
        stored = {rename(key): key for key in self.reader.tensors}
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        complete = type(model).__name__ in (self.reader.model_config.get("architectures") or ())
        base = {id(tensor) for tensor in _tensors(model.base_model).values()}
        for name, tensor in _tensors(model).items():
            if name in stored:
                self.reader.plain(stored[name], tensor)
            elif name not in tied and (complete or id(tensor) in base):
                raise CheckpointError(f"{self.reader.folder}: {name}: missing tensor")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True)
