# SPDX-License-Identifier: Apache-2.0
"""One pass of a whole model over its tokens: a decoding step with a static cache, or a prompt.

Everything but the linear layers is the same for every kind of them: the fused neighbours of
spense_kernels.ops, attention from torch, the output head in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.attention import Attention, own_kernels
from decoding.linears import BF16, GAIN, Factory, Linear
from decoding.models import ModelShape
from spense_kernels import ops

PARTS = ("linear", "attention", "quantise", "head", "rest")
IN_A_LAYER = (
    *("norm 1", "qkv", "heads", "attention", "quantise", "o"),
    *("norm 2", "gate_up", "gated", "down"),
)
PART_NAMES = {
    "linear": "linear layers",
    "attention": "attention",
    "quantise": "norms, activation, quantisation",
    "head": "output head",
    "rest": "embedding, rotary positions, cache, sampling",
}


@dataclass
class LayerWeights:
    """One decoder layer; linears in the order qkv, o, gate_up, down."""

    linears: dict[str, Linear]
    norms: tuple[Tensor, Tensor]
    qk_norms: Tensor | None  # [2, head_dim]


class Weights:
    """A whole model of one kind of linear layers.

    Everything is of about the size 1, so that the last layers still change what they are given.
    """

    def __init__(self, shape: ModelShape, make: Factory, device: torch.device):
        self.shape = shape

        def norm(*size: int) -> Tensor:
            return torch.rand(*size, device=device).add_(0.5).to(BF16)

        self.layers = []
        for _ in range(shape.layers):
            linears = {
                name: make(name, n, k, shape.qkv_bias and name == "qkv")
                for name, (n, k) in shape.linears.items()
            }
            heads = norm(2, shape.head_dim).mul_(GAIN["qkv"]) if shape.qk_norm else None
            self.layers.append(
                LayerWeights(linears, (norm(shape.hidden), norm(shape.hidden)), heads)
            )
        in_turn = [linear for layer in self.layers for linear in layer.linears.values()]
        self.final_norm = norm(shape.hidden)
        self.table = torch.randn(shape.vocabulary, shape.hidden, dtype=BF16, device=device)
        self.head = torch.randn(shape.vocabulary, shape.hidden, dtype=BF16, device=device)
        self.head *= shape.hidden**-0.5
        self.linear_bytes = sum(linear.weight_bytes for linear in in_turn)


class Cache:
    """Keys and values of all layers, filled with noise: [batch, kv_heads, context, head_dim]."""

    def __init__(
        self,
        shape: ModelShape,
        batch: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        size = (batch, shape.kv_heads, context, shape.head_dim)
        noise = torch.randn(2, *size, device=device, dtype=BF16).mul_(GAIN["qkv"])
        keys, values = (each.to(dtype) for each in noise)
        del noise
        others = [(keys.clone(), values.clone()) for _ in range(1, shape.layers)]
        self.layers = [(keys, values), *others]
        self.batch, self.context, self.dtype = batch, context, dtype


def rotary(shape: ModelShape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [tokens, head_dim / 2]."""
    steps = torch.arange(0, shape.head_dim, 2, device=positions.device) / shape.head_dim
    angles = positions[:, None] * shape.rope_theta**-steps
    return angles.cos(), angles.sin()


def split_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    heads: int,
    eps: float,
) -> Tensor:
    """Norms of heads, rotary positions, keys and values into the cache; in plain torch.

    qkv [batch * tokens, rows]; norms [2, head_dim] of q and k or None ->
    q [batch, heads, tokens, head_dim] in bf16.
    """
    batch, kv_heads, _, head_dim = k_cache.shape
    parts = qkv.view(batch, positions.shape[0], -1, head_dim).transpose(1, 2)
    q, k, v = parts.split((heads, kv_heads, kv_heads), dim=1)
    if norms is not None:
        q, k = _norm(q, norms[0], eps), _norm(k, norms[1], eps)
    q, k = _rotate(q.float(), cos, sin).to(BF16), _rotate(k.float(), cos, sin).to(BF16)
    if k_cache.dtype != BF16:
        k, v = (t.to(k_cache.dtype).view(torch.uint8) for t in (k, v))
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    k_cache[:, :, positions] = k
    v_cache[:, :, positions] = v
    return q


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@dataclass
class Step:
    """`run(parts)` computes the step, or only some of its parts on what the last whole run left.

    Every sequence, and every place of a prompt, has a token of its own: a GPU draws more power, and
    may run slower, where rows differ. Steps start from the same tokens, so that all are alike; the
    ones they choose go to `chosen`.

    Args:
        positions: int64 [tokens], places of the tokens in the cache; every sequence alike.
        attention: from decoding.attention; `causal` it does not matter to the rest.
        fused: rotary positions and the cache update in one launch, by decoding.kernels.
        count: of the first decoder layers, if not all are to run.
    """

    weights: Weights
    cache: Cache
    positions: Tensor
    attention: Attention
    fused: bool
    count: int | None = None
    left: dict[str, object] = field(default_factory=dict)

    def __post_init__(self):
        shape, device = self.weights.shape, self.positions.device
        rows = self.cache.batch * self.positions.shape[0]
        seeded = torch.Generator().manual_seed(rows)
        self.tokens = torch.randperm(shape.vocabulary, generator=seeded)[:rows].to(device)
        self.chosen = torch.zeros(self.cache.batch, dtype=torch.int64, device=device)
        self.cos, self.sin = rotary(shape, self.positions)
        kernels = own_kernels("kernels") if self.fused else None
        self.store: Callable = kernels.split_and_store if kernels else split_and_store

    def run(self, parts: tuple[str, ...] = PARTS, without: tuple[str, ...] = ()) -> None:
        """A pass; with some parts or kernels left out, the others alone, in their order."""
        whole = parts == PARTS and not without

        def do(part: str, key: str, function: Callable[..., object], *args: object) -> object:
            if part not in parts or key in without:
                return self.left[key]
            result = function(*args)
            if whole:
                self.left[key] = result
            return result

        weights, shape = self.weights, self.weights.shape
        h = do("rest", "h", F.embedding, self.tokens, weights.table)
        delta = None
        layers = list(zip(weights.layers, self.cache.layers, strict=True))
        for layer, memory in layers[: self.count]:
            qkv, o, gate_up, down = layer.linears.values()
            norm = layer.norms[0]
            x8, scale, h = do("quantise", "norm 1", self._norm, h, delta, norm, qkv.gather)
            y = do("linear", "qkv", qkv, x8, scale)
            q = do("rest", "heads", self._heads, y, layer, *memory)
            a = do("attention", "attention", self.attention, q, *memory)
            rows = a.transpose(1, 2).reshape(-1, shape.heads * shape.head_dim)
            x8, scale = do("quantise", "quantise", ops.quantize_fp8, rows, o.gather)
            delta = do("linear", "o", o, x8, scale)
            norm = layer.norms[1]
            x8, scale, h = do("quantise", "norm 2", self._norm, h, delta, norm, gate_up.gather)
            both = do("linear", "gate_up", gate_up, x8, scale)
            halves = both.split(shape.intermediate, dim=1)
            x8, scale = do("quantise", "gated", ops.silu_mul_quantize, *halves, down.gather)
            delta = do("linear", "down", down, x8, scale)
        last = do("rest", "last", self._last, h, delta)
        logits = do("head", "logits", F.linear, last, weights.head)
        do("rest", "next", self._sample, logits)

    def _norm(
        self, h: Tensor, delta: Tensor | None, weight: Tensor, gather: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        eps = self.weights.shape.eps
        if delta is None:
            return *ops.rms_norm_quantize(h, weight, gather, eps=eps), h
        return ops.add_rms_norm_quantize(delta, h, weight, gather, eps=eps)

    def _heads(self, qkv: Tensor, layer: LayerWeights, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        shape = self.weights.shape
        return self.store(
            *(qkv, self.cos, self.sin, layer.qk_norms, k_cache, v_cache, self.positions),
            *(shape.heads, shape.eps),
        )

    def _last(self, h: Tensor, delta: Tensor) -> Tensor:
        """Norm of the last token of every sequence, which alone go through the head."""
        tokens = self.positions.shape[0]
        rows = slice(None) if tokens == 1 else slice(tokens - 1, None, tokens)
        return F.rms_norm(
            h[rows] + delta[rows],
            (self.weights.shape.hidden,),
            self.weights.final_norm,
            self.weights.shape.eps,
        )

    def _sample(self, logits: Tensor) -> None:
        self.chosen.copy_(logits.argmax(dim=-1))
