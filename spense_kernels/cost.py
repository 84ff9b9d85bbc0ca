# SPDX-License-Identifier: Apache-2.0
"""Modelled time of a model's hybrid layers on an H100, and the dense fraction that a speed needs.

The estimate is the one that chooses kernels (csrc/heuristics/cost.h); it needs no GPU. It covers
the pruned projections only, fused as engines run them (q, k, v and gate, up are one GEMM each), in
a chain of launches. Attention, norms, embeddings and lm_head are left out, on both sides of every
comparison. "Dense FP8" is the same kernel at 100 % dense, not another library.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from spense_kernels.errors import UserError
from spense_kernels.format import Split

DECODE_BATCH = 16  # tokens a step unless said otherwise
_STEPS = 1000  # dense fractions are tried in steps of 1 / _STEPS
_MAX_BATCH = 1 << 20


@dataclass(frozen=True)
class Projection:
    """A weight [n, k] whose K is cut into `k_shards` equal shards."""

    n: int
    k: int
    k_shards: int = 1

    def split(self, dense_fraction: float) -> Split:
        return Split.from_fraction(self.n, self.k, dense_fraction, None, self.k_shards)


# Projections that read the same input, one GEMM in an engine.
Groups = Sequence[Sequence[Projection]]


@dataclass(frozen=True)
class Speed:
    """Modelled decode of all groups, `batch` tokens a step.

    Attributes:
        us: microseconds a step.
        dense_us: the same at 100 % dense.
        packed_bytes: of the tile streams.
        dense_fraction: logical share of dense weights.
    """

    batch: int
    us: float
    dense_us: float
    packed_bytes: int
    dense_fraction: float

    @property
    def speedup(self) -> float:
        return self.dense_us / self.us

    def to_json(self) -> dict:
        """Plain values; tokens_per_s counts the pruned projections' time alone."""
        return {
            "batch": self.batch,
            "us": round(self.us, 3),
            "dense_us": round(self.dense_us, 3),
            "speedup": round(self.speedup, 4),
            "tokens_per_s": round(self.batch * 1e6 / self.us, 1),
            "packed_bytes": self.packed_bytes,
            "dense_fraction": round(self.dense_fraction, 6),
        }


def speed_of(groups: Iterable[Sequence[Split]], batch: int = DECODE_BATCH) -> Speed:
    """Modelled speed of weights that are split already.

    Args:
        groups: splits of projections that share an input, stacked by rows in one GEMM each.
        batch: tokens a step, 1 to 2^20.

    Raises UserError for another batch, or without the host module.
    """
    check_batch(batch)
    us = dense_us = 0.0
    weights = dense = packed = 0
    for splits in groups:
        n, k = Split.stack_rows(splits)[-1][1], splits[0].k
        size = sum(split.packed_bytes for split in splits)
        us += gemm_us(batch, n, k, size)
        dense_us += gemm_us(batch, n, k, sum(_dense_bytes(split) for split in splits))
        packed += size
        weights += sum(split.n * split.k for split in splits)
        dense += sum(split.dense_fraction * split.n * split.k for split in splits)
    if not weights:
        raise UserError("speed_of: groups: expected at least one projection, got none")
    return Speed(batch, us, dense_us, packed, dense / weights)


def fraction_for_speedup(groups: Groups, speedup: float, batch: int = DECODE_BATCH) -> Speed:
    """The largest dense fraction (in steps of 0.1 %) at least `speedup` times as fast as dense FP8.

    Every projection gets the same fraction, rounded to what the format allows. The result's
    `dense_fraction` is the one to prune with.

    Raises UserError when speedup is not above 0 or even 0 % dense is slower, naming what that
    reaches.
    """
    if not 0.0 < speedup < float("inf"):
        raise UserError(f"target speed-up: expected a number above 0, got {speedup}")
    check_batch(batch)
    least, most = _uniform(groups, 0.0, batch), _uniform(groups, 1.0, batch)
    if least.speedup < speedup:
        raise UserError(
            f"target speed-up {speedup:g}: the most that these layers can reach at batch {batch} "
            f"is {least.speedup:.3f}, with no dense columns at all (modelled, H100)"
        )
    if most.speedup >= speedup:
        return most
    # More dense columns are never faster, so bisection finds the last step that is fast enough.
    low, high = 0, _STEPS
    while high - low > 1:
        middle = (low + high) // 2
        if _uniform(groups, middle / _STEPS, batch).speedup >= speedup:
            low = middle
        else:
            high = middle
    found = _uniform(groups, low / _STEPS, batch)
    # A share too small for any dense column is none.
    share = low / _STEPS if found.dense_fraction else 0.0
    return replace(found, dense_fraction=share)


def available() -> bool:
    """Whether the host module with the estimate is there; it is part of every build."""
    try:
        from spense_kernels import _C  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def gemm_us(m: int, n: int, k: int, packed_bytes: int) -> float:
    """Microseconds of one hybrid_gemm of m tokens on an H100, by estimate.

    Raises UserError where the host module is missing, which is part of every build.
    """
    try:
        from spense_kernels import _C
    except ImportError as problem:
        raise UserError(
            f"the cost model needs the host module spense_kernels._C, which does not load "
            f"({problem}); install the package anew"
        ) from problem
    return _C.sm90.estimate(m, n, k, packed_bytes)["us"]


def check_batch(batch: int) -> None:
    if not isinstance(batch, int) or not 1 <= batch <= _MAX_BATCH:
        raise UserError(f"decode batch: expected an int in 1..{_MAX_BATCH}, got {batch}")


def _uniform(groups: Groups, dense_fraction: float, batch: int) -> Speed:
    splits = [[_split(p, dense_fraction) for p in group] for group in groups]
    return speed_of(splits, batch)


@cache
def _split(projection: Projection, dense_fraction: float) -> Split:
    return projection.split(dense_fraction)


def _dense_bytes(split: Split) -> int:
    return _split(Projection(split.n, split.k), 1.0).packed_bytes
