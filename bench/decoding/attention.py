# SPDX-License-Identifier: Apache-2.0
"""Attention of one decoding step and of a prompt; the fastest one that runs is taken.

q [batch, heads, tokens, head_dim] in bf16; keys and values [batch, kv_heads, context, head_dim] in
bf16 or float8_e4m3fn. All of the cache is attended to, as in a step at its last position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from gemm.timing import Call, Recorder, Recording
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
LAUNCHES = 8  # at least, and over so many bytes that no L2 holds them
CACHED_BYTES = 128 << 20
TRIED_IN_A_STEP = 5
NEARLY = 1.35  # of the fastest alone, in time
SPLITS = (1, 2, 4, 8, 16, 32)
LEAST_CHUNK = 128  # places of the cache that are worth a program


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


def candidates(
    device: torch.device, fp8: bool, causal: bool, context: int = 0
) -> dict[str, Attention]:
    """Name and function of what may run; `context` is what our own kernel cuts into chunks."""
    if device.type == "cpu":
        if causal:
            return {"math": partial(sdpa, SDPBackend.MATH, True)}
        return {"widened": widened}
    found: dict[str, Attention] = {}
    if not causal:
        own = own_kernels("split_kv")
        for splits in SPLITS if own else ():
            if splits == 1 or (context % splits == 0 and context // splits >= LEAST_CHUNK):
                for tile in own.TILES[fp8]:
                    name = f"triton, {splits} splits, {tile}"
                    found[name] = partial(own.attend, splits, tile)
    if not fp8:
        found["flash"] = partial(sdpa, SDPBackend.FLASH_ATTENTION, causal)
        found["cudnn"] = partial(sdpa, SDPBackend.CUDNN_ATTENTION, causal)
    return found


@cache
def own_kernels(name: str) -> ModuleType | None:
    """The module of `decoding`, or None with a word where there is no Triton."""
    try:
        return import_module(f"decoding.{name}")
    except ImportError as problem:
        print(f"without own kernels: {problem}", flush=True)
        return None


def fastest(
    recorder: Recorder,
    q: Tensor,
    memory: Sequence[tuple[Tensor, Tensor]],
    causal: bool,
    step_with: Callable[[Attention], Call],
) -> tuple[str, Attention]:
    """Name and function of the one for these tensors that makes the fastest step.

    Only those that are nearly as fast as any by themselves are tried in a step, where it counts
    too how well they overlap with the kernels beside them.

    Args:
        memory: keys and values of several layers, so that no cache of the GPU holds them all.
        step_with: a step, or some layers of one, with this attention.
    """
    keys = memory[0][0]
    options = candidates(q.device, keys.dtype != q.dtype, causal, keys.shape[2])
    faults: list[str] = []
    recordings = _recordings(recorder, options, q, memory, faults)
    if not recordings and not causal and q.device.type == "cuda":
        options = {"flex": flex}  # takes seconds to compile for every shape
        recordings = _recordings(recorder, options, q, memory, faults)
    if not recordings:
        raise RuntimeError("no attention runs here: " + "; ".join(faults))
    alone = {n: t["us"] for n, t in recorder.measure(recordings, seconds=0.02).items()}
    names = _nearly_best(alone)
    if len(names) > 1:
        steps = {name: recorder.record([step_with(options[name])], 1) for name in names}
        inside = {n: t["us"] for n, t in recorder.measure(steps, seconds=0.05).items()}
        names = sorted(names, key=inside.__getitem__)
        told = (f"{name} {alone[name]:.1f}/{inside[name]:.1f}" for name in names)
        print("  attention alone/in some layers, us:", "; ".join(told), flush=True)
    return names[0], options[names[0]]


def _nearly_best(alone: dict[str, float]) -> list[str]:
    """The first few by microseconds alone."""
    names = sorted(alone, key=alone.__getitem__)[:TRIED_IN_A_STEP]
    return [name for name in names if alone[name] <= NEARLY * alone[names[0]]]


def _recordings(
    recorder: Recorder,
    options: dict[str, Attention],
    q: Tensor,
    memory: Sequence[tuple[Tensor, Tensor]],
    faults: list[str],
) -> dict[str, Recording]:
    found = {}
    layers = memory[: max(LAUNCHES, -(-CACHED_BYTES // (2 * memory[0][0].nbytes)))]
    for name, attention in options.items():
        try:
            attention(q, *memory[0])
            calls = [partial(attention, q, *layer) for layer in layers]
            found[name] = recorder.record(calls, len(calls))
        # What a library or a compiler raises where it does not fit is its own affair.
        except Exception as fault:
            faults.append(f"{name}: {fault}")
    return found
