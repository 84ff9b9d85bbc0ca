# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and prompts for tests of engines."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from spense_kernels.checkpoint import save_checkpoint
from spense_kernels.prune import PruneConfig, prune_magnitude

K_SHARDS = 2


def tiny_llama(seed: int = 0) -> nn.Module:
    """A Llama with random weights that a GPU engine's attention takes (head_dim 64), in bf16.

    Query heads make whole tiles of 128 rows, key and value heads of one rank make half a tile.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=128,
        initializer_range=0.06,
        attention_bias=True,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def prompts(vocabulary: int = 512, count: int = 12) -> list[list[int]]:
    """Random token ids, prompts of 2 to 60 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(2, 60, count).int().tolist()
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def save_tiny(path: Path, k_shards: int = K_SHARDS, seed: int = 0) -> Path:
    """The tiny Llama pruned by magnitude, o_proj and down_proj in K shards."""
    model = tiny_llama(seed)
    settings = PruneConfig(dense_fraction=0.25, k_shards=k_shards, method="magnitude")
    prune_magnitude(model, settings)
    return save_checkpoint(model, path, provenance={"seed": seed})
