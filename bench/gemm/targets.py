# SPDX-License-Identifier: Apache-2.0
"""The speeds that the SM90 kernel is held to, and which points of a result file miss them.

python bench/gemm/targets.py bench/results/gemm_h100.json      # exit code 1 where one is missed
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gemm.report import COPY, best, speed_up
from gemm.shapes import MODELS, TOKENS

MODEL_DENSE = 0.25  # dense fraction of the speed-ups over cuBLASLt
# tokens -> (each layer at least, sum of a model's four layers at least), times cuBLASLt FP8
SPEED_UPS = {
    **dict.fromkeys((1, 8, 16, 32), (1.35, 1.50)),
    64: (1.30, 1.42),
    128: (1.20, 1.30),
    **dict.fromkeys((256, 512), (1.15, 1.25)),
    **dict.fromkeys((1024, 2048, 4096, 8192), (1.25, 1.35)),
}
ALL_DENSE = ((64, 1.05), (max(TOKENS), 0.97))  # up to so many tokens, times cuBLASLt
COPY_SHARE, COPY_TOKENS, COPY_LAYERS = 0.92, 32, ("gate_up", "down")
PROMOTED_COST, PROMOTED_TOKENS = 1.10, 64  # fast_accum=False


@dataclass(frozen=True)
class Check:
    """One figure of one point; met where got >= least."""

    what: str
    layer: str
    m: int
    dense: float
    got: float
    least: float

    @property
    def met(self) -> bool:
        return self.got >= self.least

    def __str__(self) -> str:
        state = "met   " if self.met else "MISSED"
        return (
            f"{state} {self.layer:<20} M = {self.m:<5} {100 * self.dense:>4.3g}% dense: "
            f"{self.what} {self.got:.3f}, at least {self.least:.2f}"
        )


def checks_of(point: dict) -> list[Check]:
    """Every target that speaks of the point."""
    times, m, dense = point["times"], point["m"], point["dense"]
    if "spense" not in times or point["group"] not in MODELS:
        return []
    found: list[tuple[str, float | None, float]] = []
    cublas = speed_up(point)
    if dense == MODEL_DENSE and m in SPEED_UPS:
        layer, whole = SPEED_UPS[m]
        found.append(("x cuBLASLt", cublas, whole if point["kind"] == "model" else layer))
    if 0 < dense < 1:
        found.append(("x two libraries", speed_up(point, ("two_library_add",)), 1.0))
    if dense == 0:
        found.append(("x cuSPARSELt", speed_up(point, ("cusparselt",)), 1.0))
    if dense == 1:
        found.append(("x cuBLASLt", cublas, next(x for limit, x in ALL_DENSE if m <= limit)))
    us, copy = times["spense"]["us"], best(times, COPY)
    streams = point["layer"].rpartition(".")[2] in COPY_LAYERS
    if copy and m <= COPY_TOKENS and streams and point["kind"] == "layer":
        found.append(("of the copy kernel", copy / us, COPY_SHARE))
    promoted = best(times, ("spense_promoted",))
    if promoted and m <= PROMOTED_TOKENS:
        found.append(("speed kept without fast_accum", us / promoted, 1 / PROMOTED_COST))
    return [Check(what, point["layer"], m, dense, got, least) for what, got, least in found if got]


def checks(points: list[dict]) -> list[Check]:
    return [check for point in points for check in checks_of(point)]


def verdict(points: list[dict]) -> str:
    """The targets missed, one a line, and how many there are of each kind."""
    found = checks(points)
    missed = [check for check in found if not check.met]
    lines = [str(check) for check in sorted(missed, key=lambda c: (c.what, c.m, c.layer))]
    return "\n".join([*lines, f"{len(found) - len(missed)} of {len(found)} targets met"])


def main() -> int:
    points = json.loads(Path(sys.argv[1]).read_text())["points"]
    print(verdict(points))
    return int(not all(check.met for check in checks(points)))


if __name__ == "__main__":
    sys.exit(main())
