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
from spense_kernels.prune.mask import (
    PAIRS,
    cheapest_pair,
    choose_single,
    drop_forms,
    kept_places,
)

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
    fp8: bool  # round to FP8, work being in units of its rows' scales


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
    if scale is not None:  # rows are swept in units of it, so that rounding need not know it
        work = work / scale[:, None]
    keep = torch.ones(batch, k, n, dtype=torch.bool, device=weight.device)
    loss = torch.zeros(batch, n, device=weight.device)
    end = k if scale is not None or mask is not None else rules.high
    for _, error in _blocks(work, keep, factor, end, rules):
        loss += error.square().sum(dim=1)
    if scale is not None:
        work *= scale[:, None]
        loss *= scale.square()
    return Swept(work.transpose(1, 2).contiguous(), keep.transpose(1, 2).contiguous(), loss)


def swept_losses(
    weight: Tensor, factor: Tensor, dense_starts: list[int], *, coupled: bool = True
) -> Tensor:
    """`row_loss` of one sweep for each dense start, float32 [starts, B, N].

    What a sweep does before a column knows nothing of the columns behind, so that one sweep, to the
    last start, passes through the ends of all.

    Args:
        weight, factor, coupled: as of `sweep`.
        dense_starts: multiples of 4, ascending.
    """
    batch, n, _k = weight.shape
    rules = _make_rules(weight, dense_starts[-1], 0, None, None, coupled)
    work = weight.float().transpose(1, 2).contiguous()
    keep = torch.ones_like(work, dtype=torch.bool)
    loss = torch.zeros(batch, n, device=weight.device)
    found, waiting = [], list(dense_starts)
    while waiting and waiting[0] == 0:
        found.append(loss.clone())
        waiting.pop(0)
    for first, error in _blocks(work, keep, factor, rules.high, rules):
        squares = error.square()
        while waiting and waiting[0] <= first + error.shape[1]:
            found.append(loss + squares[:, : waiting.pop(0) - first].sum(dim=1))
        loss += squares.sum(dim=1)
    return torch.stack(found)


def _blocks(work: Tensor, keep: Tensor, factor: Tensor, end: int, rules: _Rules):
    """Sweep block after block in place: first column and errors [B, size, N] of each."""
    k = work.shape[1]
    for a in range(0, end, BLOCK):
        b = min(a + BLOCK, k)
        sweep_block = _replay_block if _repeats(work, a, b, rules) else _sweep_block
        error = sweep_block(work[:, a:b], keep[:, a:b], factor[:, a:b, a:b], a, rules)
        yield a, error
        if b < k:
            work[:, b:].baddbmm_(factor[:, a:b, b:].transpose(1, 2), error, alpha=-1)


def _make_rules(weight, dense_start, sparse_start, mask, scale, coupled) -> _Rules:
    batch, n, _k = weight.shape
    device = weight.device
    stop = torch.as_tensor(dense_start, device=device).expand(batch, n)[:, None, :]
    high = int(stop.max())
    if mask is not None:
        mask = mask.transpose(1, 2)
    ragged = weight.shape[2] % 4 == 3
    return _Rules(stop, sparse_start, high, coupled, ragged, mask, scale is not None)


def _repeats(work: Tensor, first: int, stop: int, rules: _Rules) -> bool:
    """Whether the block does what every block of its shape does, in too many small kernels."""
    if not work.is_cuda or stop - first != BLOCK or work.shape[0] * work.shape[2] > _GRAPH_ROWS:
        return False
    if rules.mask is None:
        sparse = rules.low <= first and stop <= rules.high
        return sparse and not rules.fp8 and not rules.ragged
    return rules.fp8


def _replay_block(work: Tensor, keep: Tensor, factor: Tensor, first: int, rules: _Rules) -> Tensor:
    """`_sweep_block` as a CUDA graph."""
    block = _block_graph(tuple(work.shape), rules.mask is not None, rules.coupled, work.device)
    last = first + BLOCK
    given = rules.stop - first if rules.mask is None else rules.mask[:, first:last]
    error, swept, kept = block(work, factor, given).unbind()
    work.copy_(swept)
    keep.copy_(kept > 0)
    return error


@functools.lru_cache(maxsize=16)
def _block_graph(shape: tuple[int, ...], masked: bool, coupled: bool, device: torch.device):
    """Of a block's work, factor and stop (the sparse part goes on behind it) or, to round to FP8,
    mask: error, work and keep float32 [3, B, BLOCK, N]. One for each kind of block."""

    def run(work, factor, given):
        work = work.clone()
        keep = torch.ones_like(work, dtype=torch.bool)
        mask, stop = (given, None) if masked else (None, given)
        rules = _Rules(stop, 0, 0 if masked else BLOCK, coupled, False, mask, masked)
        error = _sweep_block(work, keep, factor, 0, rules)
        return torch.stack([error, work, keep.float()])

    return Replayed(run, "prune: sweeps")


def _sweep_block(work: Tensor, keep: Tensor, factor: Tensor, first: int, rules: _Rules) -> Tensor:
    """Sweep the columns [first, first + size) in place; returns their errors [B, size, N].

    Few kernels a group: their launches are what a sweep of few rows takes on a GPU.
    """
    if rules.mask is not None:
        keep.copy_(rules.mask[:, first : first + work.shape[1]])
        return _replace_columns(work, keep, factor, rules.fp8)
    if rules.fp8 or rules.ragged or work.shape[1] % 4:
        return _choose_by_group(work, keep, factor, first, rules)
    return _drop_pairs(work, keep, factor, first, rules)


def _drop_pairs(work: Tensor, keep: Tensor, factor: Tensor, first: int, rules: _Rules) -> Tensor:
    """Whole groups of four, each without its cheapest pair; rows in their dense part keep all."""
    size = work.shape[1]
    error = torch.zeros_like(work)
    batch, _, n = work.shape
    forms = _forms(factor, rules.coupled)
    ends = first + torch.arange(4, size + 4, 4, device=work.device)
    dense = rules.stop < ends[:, None]  # [B, groups, N]
    none = len(PAIRS)
    choice = torch.full((batch, size // 4, n), none, device=work.device)
    for a in range(0, size, 4):
        b, index = a + 4, a // 4
        if not rules.low <= first + a < rules.high:
            continue
        formed = torch.bmm(forms[:, index], work[:, a:b])
        chosen = choice[:, index]
        chosen.copy_(cheapest_pair(formed)).masked_fill_(dense[:, index], none)
        errors = formed[:, 12:].unflatten(1, (none + 1, 4))
        place = chosen[:, None, None].expand(batch, 1, 4, n)
        error[:, a:b] = errors.gather(1, place)[:, 0]
        spread = factor[:, a:b, a:].transpose(1, 2)
        work[:, a:].baddbmm_(spread, error[:, a:b], alpha=-1)
    keep.copy_(kept_places(work.device)[choice].transpose(2, 3).flatten(1, 2))
    work *= keep  # what was dropped is zero up to rounding
    return error


def _forms(factor: Tensor, coupled: bool) -> Tensor:
    """[B, groups, 40, 4] of all whole groups of a block."""
    whole = factor.shape[-1] // 4
    index = torch.arange(4 * whole, device=factor.device).view(whole, 4)
    return drop_forms(factor[:, index[:, :, None], index[:, None, :]], coupled)


def _replace_columns(work: Tensor, keep: Tensor, factor: Tensor, fp8: bool) -> Tensor:
    """Cut every column by `keep` and round it; the columns behind make up for it."""
    size = work.shape[1]
    diagonal = factor.diagonal(dim1=1, dim2=2)[..., None]
    spread = (factor / diagonal).transpose(1, 2)  # of differences that are not divided by U_jj
    difference, result = torch.empty_like(work), torch.empty_like(work)
    limit = keep * FP8_MAX
    low = -limit
    for a in range(0, size, 4):
        b = min(a + 4, size)
        for c in range(a, b):
            current = work[:, c]
            if fp8:
                kept = torch.clamp(current, low[:, c], limit[:, c]).to(torch.float8_e4m3fn)
                result[:, c].copy_(kept)
            else:
                torch.mul(current, keep[:, c], out=result[:, c])
            torch.sub(current, result[:, c], out=difference[:, c])
            if c + 1 < b:
                step = difference[:, c, None]
                work[:, c + 1 : b].addcmul_(spread[:, c + 1 : b, c, None], step, value=-1)
        if b < size:
            work[:, b:].baddbmm_(spread[:, b:, a:b], difference[:, a:b], alpha=-1)
    work.copy_(result)
    return difference.div_(diagonal)


def _choose_by_group(
    work: Tensor, keep: Tensor, factor: Tensor, first: int, rules: _Rules
) -> Tensor:
    """Group by group where one is short, a dense part begins inside one, or FP8 comes with it."""
    size = work.shape[1]
    error = torch.zeros_like(work)
    forms = _forms(factor, rules.coupled)
    for a in range(0, size, 4):
        b, place = min(a + 4, size), first + a
        touched = rules.low <= place < rules.high
        if not (touched or rules.fp8):
            continue
        group, own = work[:, a:b], factor[:, a:b, a:b]
        if touched:
            form = forms[:, a // 4] if b == a + 4 else None
            keep[:, a:b] = _choose(group, own, form, rules.stop - place, rules.ragged)
        error[:, a:b] = _replace_columns(group, keep[:, a:b], own, rules.fp8)
        if b < size:
            spread = factor[:, a:b, b:].transpose(1, 2)
            work[:, b:].baddbmm_(spread, error[:, a:b], alpha=-1)
    return error


def _choose(group: Tensor, factor: Tensor, form: Tensor | None, room: Tensor, ragged: bool):
    """Mask of one group with `room` [B, 1, N] sparse columns a row, which keep all when short."""
    keep = torch.ones_like(group, dtype=torch.bool)
    if form is not None:
        pair = cheapest_pair(torch.bmm(form, group))
        keep = kept_places(group.device)[pair].transpose(1, 2) | (room < 4)
    if ragged and group.shape[1] >= 3:
        single = choose_single(group[:, :3], factor[:, :3, :3])
        keep[:, :3] = torch.where(room == 3, single, keep[:, :3])
    return keep


def round_to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """float32 scale * e4m3(values / scale), saturating at 448 * scale."""
    scaled = (values / scale).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn).float() * scale
