# SPDX-License-Identifier: Apache-2.0
"""Triton: rotary positions and the cache update of a step, alike for every kind of linear layers.

Kernels are compiled once a dtype, not once a batch, and may start while the kernel ahead drains
(programmatic dependent launch), as the quantising ops and the GEMM do.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# What Triton interprets on a CPU has no overlapping launches and no products of bf16.
NATIVE = not triton.knobs.runtime.interpret


@triton.jit
def wait(NATIVE: tl.constexpr):
    """For the kernel ahead to be done; the next one may start."""
    if NATIVE:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["tokens", "context", "q_heads", "kv_heads"])
def _heads_kernel(
    qkv,
    cos,
    sin,
    norms,
    q_out,
    k_cache,
    v_cache,
    positions,
    tokens,
    context,
    q_heads,
    kv_heads,
    eps,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """A row of qkv and HEADS of its heads, all of one kind: of q, of k or of v."""
    HALF: tl.constexpr = DIM // 2
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS
    batch, token = row // tokens, row % tokens
    heads = tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, HALF)[None, :]
    place = tl.load(positions + token)
    wait(NATIVE)
    at = qkv + (row * (q_heads + 2 * kv_heads) + first + heads) * DIM + columns
    a, b = tl.load(at), tl.load(at + HALF)
    if first < q_heads + kv_heads:
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        if NORM:
            squares = tl.sum(wide_a * wide_a, axis=1) + tl.sum(wide_b * wide_b, axis=1)
            r = tl.rsqrt(squares / DIM + eps)[:, None]
            weight = norms + tl.where(first < q_heads, 0, DIM) + columns
            wide_a = wide_a * r * tl.load(weight).to(tl.float32)
            wide_b = wide_b * r * tl.load(weight + HALF).to(tl.float32)
        c = tl.load(cos + token * HALF + columns)
        s = tl.load(sin + token * HALF + columns)
        a = (wide_a * c - wide_b * s).to(tl.bfloat16)
        b = (wide_b * c + wide_a * s).to(tl.bfloat16)
    if first < q_heads:
        at_q = q_out + (row * q_heads + first + heads) * DIM + columns
        tl.store(at_q, a)
        tl.store(at_q + HALF, b)
    else:
        head = first - q_heads
        cache = k_cache
        if head >= kv_heads:
            head -= kv_heads
            cache = v_cache
        at_cache = cache + ((batch * kv_heads + head + heads) * context + place) * DIM + columns
        tl.store(at_cache, a.to(k_cache.dtype.element_ty))
        tl.store(at_cache + HALF, b.to(k_cache.dtype.element_ty))


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
    """What step.split_and_store does, in one launch.

    qkv bf16 [batch * tokens, rows]; cos, sin float32 [tokens, head_dim / 2]; norms bf16
    [2, head_dim] of q and k; caches [batch, kv_heads, context, head_dim] in bf16 or float8_e4m3fn;
    positions int64 [tokens]. Returns q [batch, heads, tokens, head_dim] in bf16.
    """
    batch, kv_heads, context, dim = k_cache.shape
    tokens = positions.shape[0]
    together = math.gcd(8, heads, kv_heads)
    q = torch.empty(batch * tokens, heads, dim, dtype=torch.bfloat16, device=qkv.device)
    _heads_kernel[(batch * tokens, (heads + 2 * kv_heads) // together)](
        *(qkv, cos, sin, q if norms is None else norms, q, k_cache, v_cache, positions),
        *(tokens, context, heads, kv_heads, eps),
        NORM=norms is not None,
        HEADS=together,
        DIM=dim,
        **launch(num_warps=2),
    )
    return q.view(batch, tokens, heads, dim).transpose(1, 2)


def launch(**options: int) -> dict:
    """Options of a launch; `launch_pdl` lets it overlap the end of the one ahead."""
    return {"NATIVE": NATIVE, "launch_pdl": True, **options} if NATIVE else {"NATIVE": False}
