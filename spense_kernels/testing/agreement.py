# SPDX-License-Identifier: Apache-2.0
"""Whether an engine or a device computes what transformers on the CPU computes, teacher-forced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spense_kernels.checkpoint import load_checkpoint
from spense_kernels.linear import SpenseLinear

TOP = 8  # tokens that are compared at a position


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
    device = next(model.parameters()).device
    result = []
    for ids in prompts:
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=device)).logits[0, :-1].float()
        result.append(logits.log_softmax(dim=-1).cpu())
    return result


@dataclass(frozen=True)
class Reference:
    """What an engine or device has to agree with, at every position of every prompt.

    Attributes:
        tokens: the likeliest tokens in order, those that sampling sees: int64 [tokens - 1, TOP] a
            prompt; logprobs: theirs, float32, of transformers on the CPU in the engine's dtype.
        bound: largest difference that roundings explain: 2 E. Two implementations err
            independently around exact arithmetic (weights and the rules of FP8 are the same, but a
            value that is rounded otherwise before FP8 can move a whole step there). E is the
            largest error of transformers over all these tokens; an engine that errs as much in the
            other direction is 2 E away. Errors are larger at some positions than at others, so an
            RMS would say little about the largest.
    """

    tokens: list[Tensor]
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

    rows = log_probabilities(model(dtype), prompts)
    likeliest = [row.topk(min(TOP, row.shape[1]), dim=1) for row in rows]
    del rows
    other = model(torch.float32)
    if dtype == torch.float32:
        noise = torch.Generator().manual_seed(1)
        other.get_input_embeddings().register_forward_hook(
            lambda module, inputs, x: x * (1 + 2.0**-21 * torch.randn(x.shape, generator=noise))
        )
    exact = log_probabilities(other, prompts)
    errors = torch.cat(
        [
            (best.values - row.gather(1, best.indices)).flatten()
            for best, row in zip(likeliest, exact, strict=True)
        ]
    )
    return Reference(
        [best.indices for best in likeliest],
        [best.values for best in likeliest],
        2 * float(errors.abs().max()),
    )


@dataclass(frozen=True)
class Agreement:
    """An engine against a Reference.

    Attributes:
        positions: how many were compared, teacher-forced.
        largest: largest difference of a likely token's log-probability, infinite where the engine
            does not name one; bound: that of the reference.
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
    for ours, tokens, logprobs in zip(engine, wanted.tokens, wanted.logprobs, strict=True):
        for found, ids, values in zip(ours, tokens.tolist(), logprobs.tolist(), strict=True):
            positions += 1
            for token, value in zip(ids, values, strict=True):
                difference = abs(found[token] - value) if token in found else math.inf
                largest = max(largest, difference)
            if values[0] - values[1] > wanted.bound:
                decided += 1
                same += int(max(found, key=found.get) == ids[0])
    return Agreement(positions, largest, wanted.bound, decided, same)
