# SPDX-License-Identifier: Apache-2.0
"""The quantizer that transformers calls: around loading, saving and dequantising."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from spense_kernels import neighbours
from spense_kernels.checkpoint.save import describe_model
from spense_kernels.checkpoint.storage import (
    DIGEST_PREFIX,
    DTYPE_NAMES,
    tensor_bytes,
    tensor_digest,
)
from spense_kernels.errors import CheckpointError, SpenseError
from spense_kernels.hf.config import SpenseConfig
from spense_kernels.hf.layers import LayerLoader
from spense_kernels.linear import SpenseLinear
from spense_kernels.prune import prune_magnitude, prune_model

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class SpenseQuantizer(HfQuantizer):
    """Loads spense checkpoints, or prunes a dense model once transformers has loaded it.

    Converted layers are read, checked and packed by our own reader, one at a time; transformers
    only decides where they go, and loads everything else. All parameters come out frozen.
    """

    requires_calibration = False
    quantization_config: SpenseConfig

    def __init__(self, quantization_config: SpenseConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._loader: LayerLoader | None = None

    def validate_environment(self, *args, **kwargs) -> None:
        if self.pre_quantized and self.quantization_config.stored is None:
            raise CheckpointError(
                "config.json: quantization_config: expected that of a spense checkpoint, got "
                f"{self.quantization_config.to_dict()}"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in DTYPES:
            raise SpenseError(f"from_pretrained: dtype: expected one of {DTYPES}, got {dtype}")
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise SpenseError(
                "from_pretrained: tensor parallelism inside transformers is not supported with "
                "spense layers; use device_map, or vLLM"
            )
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise CheckpointError(
                "from_pretrained: a spense checkpoint is loaded from its files, not from state_dict"
            )
        self._loader = LayerLoader(Path(checkpoint_files[0]).parent)
        self._loader.prepare(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            loader, self._loader = self._loader, None
            loader.finish(model)
        else:
            attach(model, _prune(model, config), self)
        model.requires_grad_(False)
        layers = [m for m in model.modules() if isinstance(m, SpenseLinear)]
        on_cuda = all(layer.w_packed.is_cuda for layer in layers)
        if on_cuda if config.fuse is None else config.fuse:
            neighbours.fuse(model)

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Everything in the checkpoint form, layers on the CPU, with a digest for each tensor."""
        stored = describe_model(model)
        model.config.quantization_config = SpenseConfig.of_checkpoint(stored)
        state: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            if isinstance(module, SpenseLinear):
                state |= module.hybrid_weight().to("cpu").state_dict(prefix)
            else:
                module._save_to_state_dict(state, prefix, keep_vars=False)
        # Names change on the way to the file then, and a digest belongs to a name.
        if getattr(model, "_weight_conversions", None):
            return state, {}
        metadata = {"spense_version": "1"}
        for key, tensor in state.items():
            if tensor.is_meta:
                return state, {}
            data = tensor_bytes(tensor)
            digest = tensor_digest(DTYPE_NAMES[tensor.dtype], tensor.shape, data)
            metadata[DIGEST_PREFIX + key] = digest
        return state, metadata

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."))
        neighbours.unfuse(model)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, SpenseLinear):
                model.set_submodule(name, layer.dequantize(dtype or torch.bfloat16))
        return model


def attach(
    model: nn.Module,
    provenance: dict[str, Any] | None = None,
    quantizer: SpenseQuantizer | None = None,
) -> nn.Module:
    """Makes `save_pretrained` of a transformers model with SpenseLinear layers write a checkpoint.

    Models that from_pretrained made have this; one that `prune_model` changed in place does not.

    Args:
        provenance: as of save_checkpoint.
        quantizer: the one to keep; None makes one.

    Returns the model. Raises CheckpointError when it has no SpenseLinear layers.
    """
    config = SpenseConfig.of_checkpoint(describe_model(model, provenance))
    if quantizer is None:
        quantizer = SpenseQuantizer(config, pre_quantized=True)
    quantizer.quantization_config = config
    quantizer.pre_quantized = True
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    model.config._is_quantized = True
    model.is_quantized = True
    model.quantization_method = config.quant_method
    return model


def _prune(model: nn.Module, config: SpenseConfig) -> dict[str, Any]:
    """Prunes in place and returns the provenance."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SpenseError(
                f"from_pretrained: {name} is offloaded; pruning needs the model in memory"
            )
    model.requires_grad_(False)
    settings = config.prune_config()
    if config.calibration is None:
        report = prune_magnitude(model, settings)
    else:
        device = model.get_input_embeddings().weight.device
        report = prune_model(model, config.calibration, settings, device=device)
    return {
        "method": settings.method,
        "settings": settings.to_json(),
        "calibration": report.calibration,
        "seed": settings.seed,
        "mean_relative_error": report.mean_relative_error,
    }
