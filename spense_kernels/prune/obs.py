# SPDX-License-Identifier: Apache-2.0
"""One sweep over the columns: prune, round, and let the columns that follow make up for it.

Column j is replaced by its pruned (and rounded) value q; the error e = (w - q) / U_jj goes into
all later columns as -e U_j,j+1:, where H^-1 = U^T U (optimal brain surgeon with a fixed order).
The columns stand in the order of the sweep, so dense columns placed last absorb the most.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from spense_kernels.layout import FP8_MAX
from spense_kernels.prune.graph import Replayed
from spense_kernels.prune.mask import choose_pair, choose_single, drop_costs

BLOCK = 128  # columns between two updates of everything behind
_GRAPH_ROWS = 8192  # rows up to which a block's kernels take less time than their launches


@dataclass
class Swept:
    """Result of a sweep, columns in the sweep's order.

    Attributes:
        weight: float32 [B, N, K].
        mask: bool [B, N, K], True = kept.
        row_loss: float32 [B, N] = tr(e H e^T) of each row, with the damped H.
    """

    weight: Tensor
    mask: Tensor
    row_loss: Tensor


@dataclass
class _Rules:
    stop: Tensor  # [B, 1, N] one behind the last sparse column of each row
    low: int  # first sparse column
    high: int  # one behind the last of any row
    coupled: bool
    ragged: bool  # K leaves a last group of three
    mask: Tensor | None  # [B, K, N]
    scale: Tensor | None  # [B, N]


def sweep(
    weight: Tensor,
    factor: Tensor,
    dense_start: Tensor | int,
    *,
    sparse_start: int = 0,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    coupled: bool = True,
) -> Swept:
    """Prune to 2:4 with compensation.

    Args:
        weight: [B, N, K] in the order of the sweep (a multiple of 4 columns before each dense part,
            or a short last group).
        factor: float32 [B, K, K] upper triangular U.
        dense_start: first column behind the sparse part: int, or integer tensor [N] or [B, N] when
            rows differ.
        sparse_start: columns before this one are dense too (dense columns first).
        mask: bool [B, N, K] to use instead of choosing.
        scale: float32 [B, N]; rounds every kept weight, dense ones too, to FP8 times this.
        coupled: exact choice of the pair in a group, or SparseGPT's.
    """
    batch, n, k = weight.shape
    rules = _make_rules(weight, dense_start, sparse_start, mask, scale, coupled)
    work = weight.float().transpose(1, 2).contiguous()
    keep = torch.ones(batch, k, n, dtype=torch.bool, device=weight.device)
    loss = torch.zeros(batch, n, device=weight.device)
    end = k if scale is not None or mask is not None else rules.high
    for a in range(0, end, BLOCK):
        b = min(a + BLOCK, k)
        sweep_block = _replay_block if _repeats(work, a, b, rules) else _sweep_block
        error = sweep_block(work[:, a:b], keep[:, a:b], factor[:, a:b, a:b], a, rules)
        loss += error.square().sum(dim=1)
        if b < k:
            work[:, b:].baddbmm_(factor[:, a:b, b:].transpose(1, 2), error, alpha=-1)
    return Swept(work.transpose(1, 2).contiguous(), keep.transpose(1, 2).contiguous(), loss)


def _make_rules(weight, dense_start, sparse_start, mask, scale, coupled) -> _Rules:
    batch, n, _k = weight.shape
    device = weight.device
    stop = torch.as_tensor(dense_start, device=device).expand(batch, n)[:, None, :]
    high = int(stop.max())
    if mask is not None:
        mask = mask.transpose(1, 2)
    ragged = weight.shape[2] % 4 == 3
    return _Rules(stop, sparse_start, high, coupled, ragged, mask, scale)


def _repeats(work: Tensor, first: int, stop: int, rules: _Rules) -> bool:
    """Whether the block does what every block of its shape does, in too many small kernels."""
    if not work.is_cuda or stop - first != BLOCK or work.shape[0] * work.shape[2] > _GRAPH_ROWS:
        return False
    if rules.mask is None:
        sparse = rules.low <= first and stop <= rules.high
        return sparse and rules.scale is None and not rules.ragged
    return rules.scale is not None


def _replay_block(work: Tensor, keep: Tensor, factor: Tensor, first: int, rules: _Rules) -> Tensor:
    """`_sweep_block` as a CUDA graph."""
    block = _block_graph(tuple(work.shape), rules.mask is not None, rules.coupled, work.device)
    if rules.mask is None:
        given = (rules.stop - first,)
    else:
        given = rules.mask[:, first : first + BLOCK], rules.scale
    error, swept, kept = block(work, factor, *given).unbind()
    work.copy_(swept)
    keep.copy_(kept > 0)
    return error


@functools.lru_cache(maxsize=16)
def _block_graph(shape: tuple[int, ...], masked: bool, coupled: bool, device: torch.device):
    """Of a block's work, factor and stop (the sparse part goes on behind it), or mask and scale:
    error, work and keep float32 [3, B, BLOCK, N]. One for each kind of block."""

    def run(work, factor, first, scale=None):
        work = work.clone()
        keep = torch.ones_like(work, dtype=torch.bool)
        mask, stop = (first, None) if masked else (None, first)
        rules = _Rules(stop, 0, 0 if masked else BLOCK, coupled, False, mask, scale)
        error = _sweep_block(work, keep, factor, 0, rules)
        return torch.stack([error, work, keep.float()])

    return Replayed(run, "prune: sweeps")


def _sweep_block(work: Tensor, keep: Tensor, factor: Tensor, first: int, rules: _Rules) -> Tensor:
    """Sweep the columns [first, first + size) in place; returns their errors [B, size, N]."""
    size = work.shape[1]
    error = torch.zeros_like(work)
    costs = None
    for a in range(0, size, 4):
        b = min(a + 4, size)
        group, place = work[:, a:b], first + a
        touched = rules.low <= place < rules.high
        if rules.mask is not None:
            keep[:, a:b] = rules.mask[:, place : place + b - a]
        elif touched:
            if costs is None:
                costs = _block_costs(factor, rules.coupled)
            keep[:, a:b] = _choose(group, factor[:, a:b, a:b], costs, a // 4, place, rules)
        elif rules.scale is None:
            continue
        _sweep_group(group, keep[:, a:b], factor[:, a:b, a:b], error[:, a:b], rules.scale)
        if b < size:
            spread = factor[:, a:b, b:].transpose(1, 2)
            work[:, b:].baddbmm_(spread, error[:, a:b], alpha=-1)
    return error


def _block_costs(factor: Tensor, coupled: bool) -> Tensor:
    """[B, groups, 6, 10] of all whole groups of a block."""
    whole = factor.shape[-1] // 4
    index = torch.arange(4 * whole, device=factor.device).view(whole, 4)
    return drop_costs(factor[:, index[:, :, None], index[:, None, :]], coupled)


def _choose(group, factor, costs, index: int, place: int, rules: _Rules) -> Tensor:
    """Mask of one group; rows whose dense part has begun keep everything."""
    size = group.shape[1]
    room = rules.stop - place  # sparse columns of this group, a row
    if size == 4:
        keep = choose_pair(group, costs[:, index]) | (room < 4)
    else:
        keep = torch.ones_like(group, dtype=torch.bool)
    if rules.ragged and size >= 3:
        single = choose_single(group[:, :3], factor[:, :3, :3])
        keep[:, :3] = torch.where(room == 3, single, keep[:, :3])
    return keep


def _sweep_group(group, keep, factor, error, scale) -> None:
    for c in range(group.shape[1]):
        current = group[:, c]
        target = current * keep[:, c]
        if scale is not None:
            target = round_to_fp8(target, scale)
        step = (current - target) / factor[:, c, c, None]
        error[:, c] = step
        if c + 1 < group.shape[1]:
            group[:, c + 1 :] -= factor[:, c, c + 1 :, None] * step[:, None]
        group[:, c] = target


def round_to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """float32 scale * e4m3(values / scale), saturating at 448 * scale."""
    scaled = (values / scale).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn).float() * scale
