# SPDX-License-Identifier: Apache-2.0
"""Triton kernels between the linear layers of a decoding step, alike for every kind of them.

They are compiled once a dtype, not once a batch, and may start while the kernel ahead drains
(programmatic dependent launch), as the quantising ops and the GEMM do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# What Triton interprets on a CPU has no overlapping launches and no products of bf16.
NATIVE = not triton.knobs.runtime.interpret
ROWS = 16  # query heads of a tile, the least that tensor cores take
LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """How `attend` goes through the cache: places a step of the loop, warps, steps under way."""

    block: int = 64
    warps: int = 4
    stages: int = 3


# FP8 or not -> what is worth a try.
TILES = {False: (Tile(),), True: (Tile(), Tile(block=128, warps=8))}


@triton.jit
def _wait(NATIVE: tl.constexpr):
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
    _wait(NATIVE)
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
        **_launch(num_warps=2),
    )
    return q.view(batch, tokens, heads, dim).transpose(1, 2)


@triton.jit
def _split_bytes(pairs):
    """Two e4m3 numbers in each int16 -> those in the low bytes and those in the high ones, fp16.

    Tensor cores want rows of the cache beside each other in a register. Words of 16 bits reach them
    so through `ldmatrix`, bytes only one by one.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 sorted;
        .reg .b16 low, high;
        prmt.b32 sorted, $2, 0, 0x3120;
        mov.b32 {low, high}, sorted;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
        }""",
        "=r,=r,r",
        [pairs],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit(do_not_specialize=["context", "chunk", "group", "pairs"])
def _attend_kernel(
    q,
    keys,
    values,
    out,
    sums,
    context,
    chunk,
    group,
    pairs,
    scale,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    WHOLE: tl.constexpr,
    PAIRED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The query heads of one head of the cache, over `chunk` places of it.

    Writes the result, or with SPLIT the sum of weighted values as float32, and beside it (largest
    exponent, sum of weights). WHOLE: chunks are whole blocks. PAIRED: values are pairs of e4m3 as
    int16. An FP8 cache is multiplied as fp16, which holds all of e4m3.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    in_group = heads < group
    at_q = (pair * group + heads)[:, None] * DIM + columns[None, :]
    first = split * chunk
    last = tl.minimum(first + chunk, context)
    places = tl.arange(0, BLOCK)
    at_k = keys + pair * context * DIM + (first + places)[None, :] * DIM + columns[:, None]
    WORDS: tl.constexpr = DIM // 2 if PAIRED else DIM
    words = tl.arange(0, WORDS)
    at_v = values + pair * context * WORDS + (first + places)[:, None] * WORDS + words[None, :]
    _wait(NATIVE)
    FACTOR: tl.constexpr = tl.float32 if not NATIVE else tl.float16 if PAIRED else tl.bfloat16
    query = tl.load(q + at_q, mask=in_group[:, None], other=0.0).to(FACTOR)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WORDS), tl.float32)
    mixed_high = tl.zeros((ROWS, WORDS), tl.float32)
    for start in range(first, last, BLOCK):
        if WHOLE:
            k, v = tl.load(at_k), tl.load(at_v)
            score = tl.dot(query, k.to(FACTOR)) * scale
        else:
            inside = start + places < last
            k = tl.load(at_k, mask=inside[None, :], other=0.0)
            v = tl.load(at_v, mask=inside[:, None], other=0 if PAIRED else 0.0)
            score = tl.dot(query, k.to(FACTOR)) * scale
            score = tl.where(inside[None, :], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, axis=1))
        weight = tl.exp2(score - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weight, axis=1)
        if PAIRED:
            low, high = _split_bytes(v)
            weight = weight.to(FACTOR)
            mixed = tl.dot(weight, low, mixed * shrink[:, None])
            mixed_high = tl.dot(weight, high, mixed_high * shrink[:, None])
        else:
            weight = weight.to(tl.bfloat16).to(FACTOR)
            mixed = tl.dot(weight, v.to(FACTOR), mixed * shrink[:, None])
        peak = new_peak
        at_k += BLOCK * DIM
        at_v += BLOCK * WORDS
    if PAIRED:
        mixed = tl.interleave(mixed, mixed_high)
    if SPLIT:
        row = (split * pairs + pair) * group + heads
        to = out + row[:, None] * DIM + columns[None, :]
        tl.store(to, mixed, mask=in_group[:, None])
        tl.store(sums + 2 * row, peak, mask=in_group)
        tl.store(sums + 2 * row + 1, total, mask=in_group)
    else:
        result = (mixed / total[:, None]).to(tl.bfloat16)
        tl.store(out + at_q, result, mask=in_group[:, None])


@triton.jit(do_not_specialize=["rows"])
def _combine_kernel(
    parts, sums, out, rows, SPLITS: tl.constexpr, DIM: tl.constexpr, NATIVE: tl.constexpr
):
    """One query head: adds the parts that the splits left."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, DIM)
    each = tl.arange(0, SPLITS).to(tl.int64) * rows + row
    _wait(NATIVE)
    peaks = tl.load(sums + 2 * each)
    weight = tl.exp2(peaks - tl.max(peaks, axis=0))
    total = tl.sum(weight * tl.load(sums + 2 * each + 1), axis=0)
    part = tl.load(parts + each[:, None] * DIM + columns[None, :])
    mixed = tl.sum(part * weight[:, None], axis=0)
    tl.store(out + row * DIM + columns, (mixed / total).to(tl.bfloat16))


def attend(splits: int, tile: Tile, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one token a sequence, the context in `splits` (a power of two) equal chunks.

    q bf16 [batch, heads, 1, head_dim], contiguous; keys and values [batch, kv_heads, context,
    head_dim] in bf16 or float8_e4m3fn, contiguous. Returns bf16 [batch, heads, 1, head_dim].
    """
    batch, kv_heads, context, dim = keys.shape
    heads = q.shape[1]
    group, pairs = heads // kv_heads, batch * kv_heads
    if group > ROWS or context % splits:
        raise ValueError(f"attend: {heads} heads over {kv_heads}, {context} places in {splits}")
    out = torch.empty(batch, heads, 1, dim, dtype=torch.bfloat16, device=q.device)
    split = splits > 1
    parts = sums = out
    if split:
        parts = torch.empty(splits, batch * heads, dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(splits, batch * heads, 2, dtype=torch.float32, device=q.device)
    chunk = context // splits
    paired = NATIVE and values.dtype == torch.float8_e4m3fn
    if paired:
        values = values.view(torch.int16)
    _attend_kernel[(pairs, splits)](
        *(q, keys, values, parts, sums, context, chunk, group, pairs),
        LOG2_E / math.sqrt(dim),
        SPLIT=split,
        ROWS=ROWS,
        BLOCK=tile.block,
        DIM=dim,
        WHOLE=chunk % tile.block == 0,
        PAIRED=paired,
        **_launch(num_warps=tile.warps, num_stages=tile.stages),
    )
    if split:
        _combine_kernel[(batch * heads,)](
            *(parts, sums, out, batch * heads), SPLITS=splits, DIM=dim, **_launch(num_warps=2)
        )
    return out


def _launch(**options: int) -> dict:
    """Options of a launch; `launch_pdl` lets it overlap the end of the one ahead."""
    return {"NATIVE": NATIVE, "launch_pdl": True, **options} if NATIVE else {"NATIVE": False}
