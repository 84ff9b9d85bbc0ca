# SPDX-License-Identifier: Apache-2.0
"""Attention of one decoding step and of a prompt, from torch; the fastest one that runs is taken.

q [batch, heads, tokens, head_dim] in bf16; keys and values [batch, kv_heads, context, head_dim] in
bf16 or float8_e4m3fn. All of the cache is attended to, as in a step at its last position.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from gemm.timing import Recorder
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
LAUNCHES = 16


@cache
def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention; for one token its split-KV kernel, which takes an FP8 cache too."""
    return _flex()(q, k, v, enable_gqa=True)


def sdpa(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain SDPA for where the logic is tried; an FP8 cache is widened first."""
    return F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), enable_gqa=True)


def candidates(device: torch.device, fp8: bool, causal: bool) -> dict[str, Attention]:
    if device.type == "cpu":
        if causal:
            return {"math": partial(sdpa, SDPBackend.MATH, True)}
        return {"widened": widened}
    found: dict[str, Attention] = {}
    if not causal:
        found["flex"] = flex
    if not fp8:
        found["flash"] = partial(sdpa, SDPBackend.FLASH_ATTENTION, causal)
        found["cudnn"] = partial(sdpa, SDPBackend.CUDNN_ATTENTION, causal)
    return found


def fastest(
    recorder: Recorder, q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> tuple[str, Attention]:
    """Name and function of the fastest that runs for these tensors."""
    recordings, faults = {}, []
    options = candidates(q.device, k.dtype != q.dtype, causal)
    for name, attention in options.items():
        call = partial(attention, q, k, v)
        try:
            recordings[name] = recorder.record([call] * LAUNCHES, LAUNCHES)
        except (RuntimeError, NotImplementedError, ValueError) as fault:
            faults.append(f"{name}: {fault}")
    if not recordings:
        raise RuntimeError("no attention runs here: " + "; ".join(faults))
    times = recorder.measure(recordings, seconds=0.05)
    best = min(times, key=lambda name: times[name]["us"])
    return best, options[best]
