# SPDX-License-Identifier: Apache-2.0
"""Tiny random transformers models, one of each family that checkpoints are tested with."""

from __future__ import annotations

import torch
from torch import nn

from spense_kernels.linear import SpenseLinear

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# architecture -> (config class, its own settings)
TINY = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "MistralForCausalLM": ("MistralConfig", {"sliding_window": 5}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "SeedOssForCausalLM": ("SeedOssConfig", {"head_dim": 16, "attention_out_bias": False}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 5}),
}


def tiny_model(architecture: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    """A transformers model with random weights, in eval mode, without gradients."""
    import transformers

    config_class, own = TINY[architecture]
    config = getattr(transformers, config_class)(**_COMMON, **own)
    config.architectures = [architecture]
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)._from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.eval().requires_grad_(False)


def prune_magnitude(model: nn.Module, dense_fraction: float = 0.25) -> nn.Module:
    """Replaces, in place, every linear layer but the output embedding (magnitude, one shot)."""
    head = model.get_output_embeddings()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not head:
            model.set_submodule(name, SpenseLinear.from_dense(linear, dense_fraction))
    return model
