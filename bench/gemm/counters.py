# SPDX-License-Identifier: Apache-2.0
"""Hardware counters of single launches: which points, which counters, what Nsight Compute wrote.

Counters are numbers of one launch that runs alone with cold caches. Time in a chain of launches,
where a launch begins while the one ahead still runs, is the sweep's business.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Container
from dataclasses import asdict, dataclass

from gemm.kernels import config_of
from gemm.report import DENSE
from gemm.shapes import MODELS
from gemm.targets import MODEL_DENSE, checks_of

OURS = "hybrid_gemm"  # part of the name of our kernels
PEAK = "pct_of_peak_sustained_elapsed"
# name in the result file -> counter of Nsight Compute; those that a version lacks are left out
METRICS = {
    "ns": "gpu__time_duration.sum",
    "cycles": "sm__cycles_elapsed.max",
    "hz": "sm__cycles_elapsed.avg.per_second",
    "cycles_active": "sm__cycles_active.avg",
    "tensor_pct": f"sm__pipe_tensor_cycles_active.avg.{PEAK}",
    "tensor_hmma_pct": f"sm__pipe_tensor_op_hmma_cycles_active.avg.{PEAK}",
    "ingest_bytes": "l1tex__m_xbar2l1tex_read_bytes.sum",
    "egress_bytes": "l1tex__m_l1tex2xbar_write_bytes.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "l2_pct": f"lts__t_sectors.avg.{PEAK}",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_read_pct": f"dram__bytes_read.sum.{PEAK}",
}
INSTEAD = {"tensor_hmma_pct": "tensor_pct"}  # for an ncu that lacks the other; each costs time
ORDER = [256, 512, 1024, 128, 64, 2048, 32, 4096, 8192, 16, 8, 1]  # of tokens
LEAST = ("ns", "cycles", "ingest_bytes", "l2_bytes", "dram_read_bytes")  # the second try's


@dataclass(frozen=True)
class Point:
    """One problem to be counted, and what ours is compared with there.

    rival: cuBLASLt with the scaling that was the faster, cuSPARSELt at 0 % dense.
    """

    layer: str
    m: int
    dense: float
    rival: str

    @property
    def rival_work(self) -> tuple[str, int, str]:
        """What the rival does is the same at every dense fraction."""
        return self.layer, self.m, self.rival


def missed_points(points: list[dict], dense: Container[float] | None = None) -> list[Point]:
    """Layers of a sweep's result that miss a target, alone or in a sum of their model's layers.

    Those that say most come first, should the time not do for all: layers that miss one alone
    before others of a sum, tokens in ORDER. Last those with cuSPARSELt, which may break the GPU.
    """
    missed = [p for p in points if not all(check.met for check in checks_of(p))]
    if dense is not None:
        missed = [p for p in missed if p["dense"] in dense]
    alone = {_place(p) for p in missed if p["kind"] == "layer"}
    wanted = alone | {
        (layer.label, p["m"], p["dense"])
        for p in missed
        if p["kind"] == "model"
        for layer in MODELS[p["group"]]
    }
    found = [p for p in points if p["kind"] == "layer" and _place(p) in wanted]

    def value(p: dict) -> tuple:
        m = p["m"]
        order = ORDER.index(m) if m in ORDER else len(ORDER)
        return p["dense"] == 0, _place(p) not in alone, order, p["dense"] != MODEL_DENSE

    return [Point(p["layer"], p["m"], p["dense"], _rival(p)) for p in sorted(found, key=value)]


def _place(point: dict) -> tuple[str, int, float]:
    return point["layer"], point["m"], point["dense"]


def _rival(point: dict) -> str:
    if point["dense"] == 0:
        return "cusparselt"
    us = {name: point["times"][name]["us"] for name in DENSE if name in point["times"]}
    return min(us, key=us.__getitem__, default=DENSE[0])


def known_metrics(listing: str) -> dict[str, str]:
    """METRICS without what `ncu --query-metrics` does not list; all where it lists nothing."""
    names = set(re.findall(r"^\s*([a-z]\w*__\w+)", listing, re.MULTILINE))
    if not names:
        return METRICS
    found = {key: of for key, of in METRICS.items() if of.partition(".")[0] in names}
    return {key: of for key, of in found.items() if INSTEAD.get(key) not in found}


def launches(log: str, metrics: dict[str, str]) -> list[dict]:
    """{"kernel"} and what was counted, in METRICS' names, of each launch of `--csv --page raw`."""
    lines = [line for line in log.splitlines() if line.startswith('"')]
    found = []
    for row in csv.DictReader(lines):
        if not (row.get("ID") or "").isdigit():
            continue  # the units
        values = {key: _number(row.get(of)) for key, of in metrics.items()}
        values = {key: value for key, value in values.items() if value is not None}
        found.append({"kernel": row["Kernel Name"]} | values)
    return found


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def by_point(points: list[Point], found: list[dict]) -> list[dict]:
    """Launches of the points in their order: ours, then whatever the rival runs, once for all.

    Raises:
        ValueError: there are not as many launches of ours as points.
    """
    ours = [i for i, launch in enumerate(found) if OURS in launch["kernel"]]
    if len(ours) != len(points):
        raise ValueError(f"counters: expected {len(points)} launches of {OURS}, got {len(ours)}")
    theirs: dict[tuple, list[dict]] = {}
    counted = []
    for point, at, end in zip(points, ours, [*ours[1:], len(found)], strict=True):
        launches_of = theirs.setdefault(point.rival_work, found[at + 1 : end])
        launch = found[at] | {"config": config_of(found[at]["kernel"])}
        counted.append(asdict(point) | {"ours": launch, "theirs": launches_of})
    return counted
