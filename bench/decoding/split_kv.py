# SPDX-License-Identifier: Apache-2.0
"""Triton: attention of one token a sequence, the cache split among programs where these are few."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from decoding.kernels import NATIVE, launch, wait

ROWS = 16  # query heads of a tile, the least that tensor cores take
LOG2_E = math.log2(math.e)
LOWEST = tl.constexpr(-1e30)  # a score of nothing; finite, so that differences are numbers
AHEAD_BYTES = 16 << 20  # of a cache, brought into a third of the L2 of an H100
PROGRAMS = 264  # of `attend`, that run at once on an H100


class Tile(NamedTuple):
    """How `attend` goes through the cache: places a step of the loop, warps, steps under way.

    With `stream` it also brings what comes later into L2, always equally far ahead.
    """

    block: int = 64
    warps: int = 4
    stages: int = 4
    stream: bool = False

    def __str__(self) -> str:
        stream = ", streamed" if self.stream else ""
        return f"{self.block} places, {self.warps} warps, {self.stages} stages{stream}"


# FP8 or not -> what is worth a try.
TILES = {False: (Tile(), Tile(32, 2, 3)), True: (Tile(), Tile(128, 8, 3))}


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


@triton.jit
def _bring_closer(at, count, BYTES: tl.constexpr):
    """Asks for the first `count` numbers at `at` to be brought into L2, which takes no waiting."""
    PIECE: tl.constexpr = 16384 // BYTES
    for start in range(0, count, PIECE):
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 thread;
            .reg .b64 policy;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            createpolicy.fractional.L2::evict_first.b64 policy, 1.0;
            @first cp.async.bulk.prefetch.L2.global.L2::cache_hint [$1], $2, policy;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [(at + start).to(tl.int64), tl.minimum(PIECE, count - start) * BYTES],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["context", "chunk", "group", "ahead"])
def _attend_kernel(
    q,
    keys,
    values,
    out,
    parts,
    sums,
    arrivals,
    context,
    chunk,
    group,
    ahead,
    scale,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    DIM: tl.constexpr,
    WHOLE: tl.constexpr,
    STREAM: tl.constexpr,
    PAIRED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The query heads of one head of the cache, over `chunk` places of it.

    Every warp goes through places of its own, BLOCK / WARPS a step, and meets the others only at
    the end. With SPLIT a program leaves its sum of weighted values in `parts` and (largest
    exponent, sum of weights) in `sums`; the last one of a head to arrive adds up what all left.
    WHOLE: chunks are whole blocks. PAIRED: values are pairs of e4m3 as int16. An FP8 cache is
    multiplied as fp16, which holds all of e4m3. `ahead` places are brought into L2 while the kernel
    ahead still runs; that one may write some of them, which L2 minds.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = split * chunk
    last = tl.minimum(first + chunk, context)
    WORDS: tl.constexpr = DIM // 2 if PAIRED else DIM
    keys += (pair * context + first) * DIM
    values += (pair * context + first) * WORDS
    BYTES: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth // 8
    if NATIVE:
        _bring_closer(keys, ahead * DIM, BYTES)
        _bring_closer(values, ahead * WORDS, DIM // WORDS * BYTES)
    heads = tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    in_group = (heads < group)[:, None]
    at_q = (pair * group + heads)[:, None] * DIM + columns[None, :]
    each: tl.constexpr = BLOCK // WARPS
    places = tl.arange(0, WARPS)[:, None] * each + tl.arange(0, each)[None, :]
    at_k = keys + places[:, :, None] * DIM + columns[None, None, :]
    at_v = values + places[:, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    wait(NATIVE)
    FACTOR: tl.constexpr = tl.float32 if not NATIVE else tl.float16 if PAIRED else tl.bfloat16
    query = tl.load(q + at_q, mask=in_group, other=0.0).to(FACTOR)
    query = tl.broadcast_to(query[None, :, :], (WARPS, ROWS, DIM))
    peak = tl.full((WARPS, ROWS), float("-inf"), tl.float32)
    total = tl.zeros((WARPS, ROWS), tl.float32)
    mixed = tl.zeros((WARPS, ROWS, WORDS), tl.float32)
    mixed_high = tl.zeros((WARPS, ROWS, WORDS), tl.float32)
    for start in range(first, last, BLOCK):
        if STREAM:
            further = start - first + ahead
            if first + further + BLOCK <= last:
                _bring_closer(keys + further * DIM, BLOCK * DIM, BYTES)
                _bring_closer(values + further * WORDS, BLOCK * WORDS, DIM // WORDS * BYTES)
        if WHOLE:
            k, v = tl.load(at_k), tl.load(at_v)
            score = tl.dot(query, tl.permute(k, (0, 2, 1)).to(FACTOR)) * scale
        else:
            inside = start + places < last
            k = tl.load(at_k, mask=inside[:, :, None], other=0.0)
            v = tl.load(at_v, mask=inside[:, :, None], other=0 if PAIRED else 0.0)
            score = tl.dot(query, tl.permute(k, (0, 2, 1)).to(FACTOR)) * scale
            score = tl.where(inside[:, None, :], score, LOWEST)
        new_peak = tl.maximum(peak, tl.max(score, axis=2))
        weight = tl.exp2(score - new_peak[:, :, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weight, axis=2)
        if PAIRED:
            low, high = _split_bytes(v)
            weight = weight.to(FACTOR)
            mixed = tl.dot(weight, low, mixed * shrink[:, :, None])
            mixed_high = tl.dot(weight, high, mixed_high * shrink[:, :, None])
        else:
            weight = weight.to(tl.bfloat16).to(FACTOR)
            mixed = tl.dot(weight, v.to(FACTOR), mixed * shrink[:, :, None])
        peak = new_peak
        at_k += BLOCK * DIM
        at_v += BLOCK * WORDS
    top = tl.max(peak, axis=0)
    shrink = tl.exp2(peak - top[None, :])
    total = tl.sum(total * shrink, axis=0)
    mixed = _over_warps(mixed * shrink[:, :, None], WARPS)
    if PAIRED:
        mixed = tl.interleave(mixed, _over_warps(mixed_high * shrink[:, :, None], WARPS))
    if SPLIT:
        rows = tl.num_programs(0) * group
        row = split * rows + pair * group + heads
        tl.store(parts + row[:, None] * DIM + columns[None, :], mixed, mask=in_group)
        tl.store(sums + 2 * row, top, mask=heads < group)
        tl.store(sums + 2 * row + 1, total, mask=heads < group)
        tl.debug_barrier()
        splits = tl.num_programs(1)
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu") == splits - 1:
            tl.store(arrivals + pair, 0)
            mixed, total = _add_parts(
                *(parts, sums, pair * group + heads, rows, heads < group, splits),
                WARPS,
                ROWS,
                DIM,
            )
            tl.store(out + at_q, (mixed / total[:, None]).to(tl.bfloat16), mask=in_group)
    else:
        tl.store(out + at_q, (mixed / total[:, None]).to(tl.bfloat16), mask=in_group)


@triton.jit
def _over_warps(x, WARPS: tl.constexpr):
    """Sum of x [WARPS, rows, columns] over the first; adds numbers that one thread has."""
    x = tl.permute(x, (1, 2, 0))
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    if WARPS == 8:
        low, high = tl.split(tl.reshape(x, (ROWS, COLUMNS, 4, 2)))
        x = low + high
    if WARPS >= 4:
        low, high = tl.split(tl.reshape(x, (ROWS, COLUMNS, 2, 2)))
        x = low + high
    low, high = tl.split(tl.reshape(x, (ROWS, COLUMNS, 2)))
    return low + high


@triton.jit
def _part(parts, sums, row, left, DIM: tl.constexpr):
    """What one split left of the rows `row`: weighted values, largest exponents, weights."""
    at = parts + row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    # Not from L1, which knows nothing of what other programs write.
    part = tl.load(at, mask=left[:, None], other=0.0, cache_modifier=".cg")
    peak = tl.load(sums + 2 * row, mask=left, other=LOWEST, cache_modifier=".cg")
    weight = tl.load(sums + 2 * row + 1, mask=left, other=0.0, cache_modifier=".cg")
    return part, peak, weight


@triton.jit
def _add_parts(
    parts,
    sums,
    row,
    rows,
    here,
    splits,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Sums over the splits, always in the same order: of weighted values, and of weights.

    `row` [ROWS]: in the first split, of `rows` in each; TOGETHER: splits read at a time.
    """
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(0, splits, TOGETHER):
        found = ()
        new_top = top
        for i in tl.static_range(TOGETHER):
            split = start + i
            found += (_part(parts, sums, row + split * rows, here & (split < splits), DIM),)
        for i in tl.static_range(TOGETHER):
            new_top = tl.maximum(new_top, found[i][1])
        shrink = tl.exp2(top - new_top)
        total *= shrink
        mixed *= shrink[:, None]
        for i in tl.static_range(TOGETHER):
            factor = tl.exp2(found[i][1] - new_top)
            total += found[i][2] * factor
            mixed += found[i][0] * factor[:, None]
        top = new_top
    return mixed, total


@cache
def _arrivals(device: torch.device, pairs: int) -> Tensor:
    """Zeros, which every launch leaves as it found them."""
    return torch.zeros(pairs, dtype=torch.int32, device=device)


def attend(
    splits: int, tile: Tile, q: Tensor, keys: Tensor, values: Tensor, ahead: int = AHEAD_BYTES
) -> Tensor:
    """Attention of one token a sequence, the context in `splits` equal chunks.

    q bf16 [batch, heads, 1, head_dim], contiguous; keys and values [batch, kv_heads, context,
    head_dim] in bf16 or float8_e4m3fn, contiguous. Returns bf16 [batch, heads, 1, head_dim].
    Before a first call is recorded in a graph it has to run once. `ahead`: of the cache, in bytes,
    what is brought into L2 before the kernel ahead is done.
    """
    batch, kv_heads, context, dim = keys.shape
    heads = q.shape[1]
    group, pairs = heads // kv_heads, batch * kv_heads
    if group > ROWS or context % splits:
        raise ValueError(f"attend: {heads} heads over {kv_heads}, {context} places in {splits}")
    out = torch.empty(batch, heads, 1, dim, dtype=torch.bfloat16, device=q.device)
    split = splits > 1
    parts, sums, arrivals = out, out, out
    if split:
        parts = torch.empty(splits, batch * heads, dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(splits, batch * heads, 2, dtype=torch.float32, device=q.device)
        arrivals = _arrivals(q.device, pairs)
    chunk = context // splits
    paired = NATIVE and values.dtype == torch.float8_e4m3fn
    if paired:
        values = values.view(torch.int16)
    at_once = min(pairs * splits, PROGRAMS)
    _attend_kernel[(pairs, splits)](
        *(q, keys, values, out, parts, sums, arrivals, context, chunk, group),
        min(chunk, ahead // (2 * dim * keys.itemsize * at_once)),
        LOG2_E / math.sqrt(dim),
        SPLIT=split,
        ROWS=ROWS,
        BLOCK=tile.block,
        WARPS=tile.warps,
        DIM=dim,
        WHOLE=chunk % tile.block == 0,
        STREAM=NATIVE and tile.stream,
        PAIRED=paired,
        **launch(num_warps=tile.warps, num_stages=tile.stages),
    )
    return out
