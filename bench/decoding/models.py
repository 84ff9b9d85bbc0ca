# SPDX-License-Identifier: Apache-2.0
"""Shapes of whole models, as their config.json give them. Speed does not depend on the weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Llama family. Heads are of attention, kv_heads of its keys and values."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    eps: float = 1e-6

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(n, k) of the fused linear layers of one decoder layer."""
        return {
            "qkv": (self.qkv_rows, self.hidden),
            "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    def cache_bytes(self, batch: int, context: int, element_bytes: int) -> int:
        """Of the keys and values of all layers."""
        return 2 * self.layers * batch * self.kv_heads * context * self.head_dim * element_bytes


QWEN3_32B = ModelShape(
    name="qwen3-32b",
    hidden=5120,
    layers=64,
    heads=64,
    kv_heads=8,
    head_dim=128,
    intermediate=25600,
    vocabulary=151936,
    qkv_bias=False,
    qk_norm=True,
    rope_theta=1e6,
)
SEED_OSS_36B = ModelShape(
    name="seed-oss-36b",
    hidden=5120,
    layers=64,
    heads=80,
    kv_heads=8,
    head_dim=128,
    intermediate=27648,
    vocabulary=155136,
    qkv_bias=True,
    qk_norm=False,
    rope_theta=1e7,
)
# For trying the logic.
TINY = ModelShape(
    name="tiny",
    hidden=256,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=64,
    intermediate=512,
    vocabulary=320,
    qkv_bias=True,
    qk_norm=True,
    rope_theta=1e4,
)
MODELS = {shape.name: shape for shape in (QWEN3_32B, SEED_OSS_36B, TINY)}
