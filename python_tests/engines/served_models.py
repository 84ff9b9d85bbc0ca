# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for engines, what transformers computes with them, and how far engines may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spense_kernels import SpenseLinear
from spense_kernels.checkpoint import load_checkpoint, save_checkpoint
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


class RowParallel(nn.Module):
    """A row-parallel SpenseLinear as `ranks` ranks compute it: each quantises its own columns."""

    def __init__(self, layer: SpenseLinear, ranks: int):
        super().__init__()
        weight = layer.hybrid_weight()
        each = weight.split.k_shards // ranks
        self.parts = nn.ModuleList(
            SpenseLinear.from_hybrid(weight.shard(r * each, (r + 1) * each)) for r in range(ranks)
        )

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.chunk(len(self.parts), dim=-1)
        first, *others = (part(piece) for part, piece in zip(self.parts, pieces, strict=True))
        for other in others:
            first = first + other
        return first


def parallel(model: nn.Module, ranks: int) -> nn.Module:
    """The model as a tensor-parallel engine computes it, on one device; in place."""
    if ranks > 1:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, SpenseLinear) and name.endswith(("o_proj", "down_proj")):
                model.set_submodule(name, RowParallel(layer, ranks))
    return model


def log_probabilities(model: nn.Module, prompts: list[list[int]]) -> list[Tensor]:
    """Of each prompt: float32 [tokens - 1, vocabulary], teacher-forced."""
    result = []
    for ids in prompts:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
        result.append(logits.log_softmax(dim=-1))
    return result


@dataclass(frozen=True)
class Reference:
    """What an engine has to agree with.

    Attributes:
        logprobs: of transformers in the engine's dtype, float32 [tokens - 1, vocabulary] a prompt.
        bound: largest difference that roundings explain. Two implementations err independently
            around exact arithmetic (weights and the rules of FP8 are the same, but a value that is
            rounded otherwise before FP8 can move a whole step there). The RMS of that error, e, is
            measured on transformers; the difference of two is then about normal with sqrt(2) e, and
            the largest of n such is below sqrt(2) e sqrt(2 ln 2 n) in most draws; 1.5 times that
            leaves room for errors that are not quite normal.
    """

    logprobs: list[Tensor]
    bound: float


def reference(
    path: Path, prompts: list[list[int]], ranks: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Reference:
    """Of a checkpoint as `ranks` tensor-parallel ranks compute it in this dtype.

    In bfloat16 the error is that against float32; in float32 it is what embeddings do that are off
    by 2^-21, as the roundings of a few steps may leave them.
    """

    def model(kind: torch.dtype) -> nn.Module:
        return parallel(load_checkpoint(path, dtype=kind, fuse=False), ranks)

    got = log_probabilities(model(dtype), prompts)
    other = model(torch.float32)
    if dtype == torch.float32:
        noise = torch.Generator().manual_seed(1)
        other.get_input_embeddings().register_forward_hook(
            lambda module, inputs, x: x * (1 + 2.0**-21 * torch.randn(x.shape, generator=noise))
        )
    exact = log_probabilities(other, prompts)
    errors = torch.cat([(a - b).flatten() for a, b in zip(got, exact, strict=True)])
    rms = float(errors.double().square().mean().sqrt())
    largest = (2 * math.log(2 * errors.numel())) ** 0.5
    return Reference(got, 1.5 * 2**0.5 * rms * largest)


@dataclass(frozen=True)
class Agreement:
    """An engine against a Reference.

    Attributes:
        positions: how many were compared, teacher-forced.
        largest: largest difference of a log-probability; bound: that of the reference.
        decided: positions where the two likeliest tokens lie further apart than the bound.
        same_argmax: how many of those have the same likeliest token in both.
    """

    positions: int
    largest: float
    bound: float
    decided: int
    same_argmax: int

    @property
    def ok(self) -> bool:
        return self.largest <= self.bound and self.same_argmax == self.decided > 0


def compare(engine: list[list[dict[int, float]]], wanted: Reference) -> Agreement:
    """Log-probabilities of an engine, token id -> value a position, against the reference."""
    largest, positions, decided, same = 0.0, 0, 0, 0
    for ours, theirs in zip(engine, wanted.logprobs, strict=True):
        for found, row in zip(ours, theirs, strict=True):
            ids = torch.tensor(list(found))
            values = torch.tensor(list(found.values()))
            largest = max(largest, float((values - row[ids]).abs().max()))
            best = row.topk(2)
            positions += 1
            if float(best.values[0] - best.values[1]) > wanted.bound:
                decided += 1
                same += int(ids[values.argmax()] == best.indices[0])
    return Agreement(positions, largest, wanted.bound, decided, same)
