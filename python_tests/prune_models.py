# SPDX-License-Identifier: Apache-2.0
"""Tiny models of four families, quick settings, and a collector of pruned layers."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from spense_kernels.finetune import StudentLinear
from spense_kernels.prune import PruneConfig, prune_model
from spense_kernels.prune.install import PrunedModule

COMMON = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 16}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 12}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 12, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
QUICK = {"search_rounds": 3, "search_rows": 64, "refit_steps": 4, "sensitivity_sequences": 2}
QUICK |= {"admm_steps": 0}


def quick(**changes) -> PruneConfig:
    return PruneConfig(**{**QUICK, **changes})


def tokens_for_calibration():
    """int64 [6, 32]."""
    return torch.randint(0, 211, (6, 32), generator=torch.Generator().manual_seed(1))


def make(family: str, **changes):
    config, model, extra = FAMILIES[family]
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**{**COMMON, **extra, **changes})
    return getattr(transformers, model)(settings).eval().requires_grad_(False)


class Keep:
    """on_layer that only collects what would be installed."""

    def __init__(self):
        self.layers: list[dict[str, PrunedModule]] = []

    def __call__(self, layer, modules):
        self.layers.append(modules)

    def tensors(self):
        for modules in self.layers:
            for name, pruned in sorted(modules.items()):
                for field, value in vars(pruned).items():
                    yield name, field, value


def pruned_tensors(model, tokens, config, **options):
    keep = Keep()
    prune_model(model, tokens, config, on_layer=keep, **options)
    return keep


def same(a: Keep, b: Keep) -> bool:
    pairs = zip(a.tensors(), b.tensors(), strict=True)
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for (*_, x), (*_, y) in pairs
    )


def distance(model, other, tokens) -> float:
    return float((model(tokens).logits - other(tokens).logits).square().mean())


def student_of(family: str) -> nn.Module:
    """A tiny model whose layers are StudentLinear with half of the weights gone."""
    model = make(family)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and ".layers." in name:
            weight = layer.weight.detach()
            mask = weight.abs() >= weight.abs().median()
            model.set_submodule(name, StudentLinear(weight, mask, layer.bias))
    return model
