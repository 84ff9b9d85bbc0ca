# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks about a checkpoint with quant_method "spense"."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from spense_kernels.checkpoint.config import QUANT_METHOD, ModuleEntry, SpenseConfig
from spense_kernels.errors import CheckpointError
from spense_kernels.vllm.linear import SpenseLinearMethod


@register_quantization_config(QUANT_METHOD)
class SpenseVllmConfig(QuantizationConfig):
    """The `quantization_config` of a checkpoint (docs/format.md, section 4), in vLLM's names."""

    def __init__(self, stored: SpenseConfig):
        super().__init__()
        self.modules: dict[str, ModuleEntry] = dict(stored.modules)

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 90

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpenseVllmConfig:
        return cls(SpenseConfig.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for a converted layer, vLLM's own for a linear layer that was left dense.

        Raises CheckpointError when only some parts of a fused layer are converted, or something
        that is no linear layer of vLLM (lm_head) is.
        """
        names = self.part_names(prefix)
        found = [name for name in names if name in self.modules]
        if not isinstance(layer, LinearBase):
            if found:
                raise CheckpointError(
                    f"{prefix}: is pruned in this checkpoint, but the plugin serves linear layers "
                    f"only, and vLLM has a {type(layer).__name__} there. Prune without it"
                )
            return None
        if not found:
            return UnquantizedLinearMethod()
        if len(found) < len(names):
            left = sorted(set(names) - set(found))
            raise CheckpointError(
                f"{prefix}: vLLM computes {', '.join(names)} in one layer, so all or none must be "
                f"pruned; {', '.join(left)} is not"
            )
        return SpenseLinearMethod({name: self.modules[name] for name in names})

    def part_names(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the layers that vLLM computes as `prefix`, in vLLM's order."""
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{parent}.{part}" if parent else part for part in parts]
