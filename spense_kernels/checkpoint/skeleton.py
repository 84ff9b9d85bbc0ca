# SPDX-License-Identifier: Apache-2.0
"""A transformers model without weights: parameters on meta, buffers as constructors make them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from spense_kernels.checkpoint.config import ModuleEntry, SpenseConfig
from spense_kernels.errors import CheckpointError
from spense_kernels.linear import SpenseLinear


def build_skeleton(folder: Path, config: SpenseConfig, dtype: torch.dtype | None) -> nn.Module:
    """The model of config.json with its listed linears replaced by empty SpenseLinear.

    Parameters are on meta; buffers that no checkpoint stores (rotary frequencies, embedding
    scales) are real. Raises CheckpointError when the architecture is unknown or a listed module
    is not a linear layer of that shape.
    """
    transformers = _transformers()
    # transformers and its config validators raise errors of many classes for a config they dislike.
    try:
        hf_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as fault:
        raise CheckpointError(f"{folder / 'config.json'}: not a model config: {fault}") from fault
    hf_config.quantization_config = None
    del hf_config.quantization_config
    name = (getattr(hf_config, "architectures", None) or [None])[0]
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (
        isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    ):
        raise CheckpointError(
            f"{folder / 'config.json'}: architectures: expected a model class of transformers "
            f"{transformers.__version__}, got {name!r}"
        )
    try:
        with parameters_on_meta():
            model = model_class._from_config(hf_config, dtype=dtype or hf_config.dtype)
    except Exception as fault:
        raise CheckpointError(f"{folder / 'config.json'}: no {name} from it: {fault}") from fault
    for module, entry in config.modules.items():
        check_linear(model, module, entry)
        empty = SpenseLinear(entry.k, entry.n, entry.bias, device="meta")
        model.set_submodule(module, empty)
    return model.eval().requires_grad_(False)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread's modules register go to the meta device; buffers stay real."""
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None):
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def expected_tensors(model: nn.Module) -> dict[str, Tensor]:
    """name -> tensor (meta or placeholder) of everything a checkpoint of this model holds.

    Of parameters that are shared only the first name counts, the one that is stored.
    """
    tensors, seen = {}, set()
    for name, module in model.named_modules():
        own: dict[str, Tensor] = {}
        module._save_to_state_dict(own, f"{name}." if name else "", keep_vars=True)
        for key, tensor in own.items():
            if id(tensor) not in seen:
                tensors[key] = tensor
                seen.add(id(tensor))
    return tensors


def set_tensor(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Puts `new` in place of parameter or buffer `old`, under every name that shares it."""
    parameter = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else None
    for module in model.modules():
        for key, value in list(module._parameters.items()):
            if value is old:
                module._parameters[key] = parameter
        for key, value in list(module._buffers.items()):
            if value is old:
                module._buffers[key] = new


def check_linear(model: nn.Module, name: str, entry: ModuleEntry) -> None:
    """Raises CheckpointError unless the model has a linear layer of that name and shape."""
    try:
        linear = model.get_submodule(name)
    except AttributeError as fault:
        raise CheckpointError(f"quantization_config.modules: the model has no {name!r}") from fault
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(
            f"quantization_config.modules[{name!r}]: expected a linear layer in the model, "
            f"got {type(linear).__name__}"
        )
    got = (entry.n, entry.k, entry.bias)
    expected = (linear.out_features, linear.in_features, linear.bias is not None)
    if got != expected:
        raise CheckpointError(
            f"quantization_config.modules[{name!r}]: the model expects (n, k, bias) = {expected}, "
            f"got {got}"
        )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as fault:
        raise CheckpointError(
            "checkpoints need transformers: pip install 'spense-kernels[models]'"
        ) from fault
    return transformers
