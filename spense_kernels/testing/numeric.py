# SPDX-License-Identifier: Apache-2.0
"""Comparisons: worst 128 x 128 tile of a random result, bit for bit report of an exact one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TileDiff:
    """Worst tile of a difference: `rms` = RMS(out - ref) / RMS(ref) there, both over the tile.

    `tile` is the (row, column) of that tile's first element; `max_abs` the largest difference
    anywhere, at `max_at`.
    """

    rms: float
    tile: tuple[int, int]
    max_abs: float
    max_at: tuple[int, int]


def tile_diff(out: Tensor, ref: Tensor) -> TileDiff:
    """Compares [m, n] results tile by tile in float64; NaN anywhere makes `rms` infinite."""
    if out.shape != ref.shape or out.dim() != 2:
        raise ValueError(f"tile_diff: out {list(out.shape)} and ref {list(ref.shape)} must be 2-D")
    if not out.numel():
        return TileDiff(0.0, (0, 0), 0.0, (0, 0))
    ref = ref.double().cpu()
    diff = out.double().cpu() - ref
    diff = torch.where(torch.isfinite(diff), diff, torch.inf)
    error, power = _tile_sums(diff), _tile_sums(ref)
    # A tile of zeros has to be met exactly.
    ratio = torch.where(error == 0, 0.0, error / power).sqrt()
    worst = divmod(int(ratio.argmax()), ratio.shape[1])
    at = divmod(int(diff.abs().argmax()), diff.shape[1])
    tile = (worst[0] * TILE, worst[1] * TILE)
    return TileDiff(float(ratio[worst]), tile, float(diff.abs().max()), at)


def bitwise_report(out: Tensor, ref: Tensor, limit: int = 8) -> str:
    """Empty when both tensors agree bit for bit, else text with the first differing places."""
    if out.shape != ref.shape or out.dtype != ref.dtype:
        return f"{out.dtype} {list(out.shape)} against {ref.dtype} {list(ref.shape)}"
    view = _BITS[out.element_size()]
    bits, wanted = (t.detach().cpu().contiguous().view(view) for t in (out, ref))
    places = (bits != wanted).nonzero()
    if not len(places):
        return ""
    lines = [f"{len(places)} of {out.numel()} elements differ"]
    for place in places[:limit].tolist():
        at = tuple(place)
        lines.append(f"  {place}: got {out[at].item()!r}, expected {ref[at].item()!r}")
    return "\n".join(lines)


def assert_bitwise(out: Tensor, ref: Tensor) -> None:
    """AssertionError with `bitwise_report` unless both tensors agree bit for bit."""
    report = bitwise_report(out, ref)
    assert not report, report


def _tile_sums(x: Tensor) -> Tensor:
    """Sum of squares of every 128 x 128 tile; ragged tiles count what they have."""
    rows, columns = -(-x.shape[0] // TILE), -(-x.shape[1] // TILE)
    x = F.pad(x * x, (0, columns * TILE - x.shape[1], 0, rows * TILE - x.shape[0]))
    return x.view(rows, TILE, columns, TILE).sum(dim=(1, 3))
