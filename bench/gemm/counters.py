# SPDX-License-Identifier: Apache-2.0
"""Hardware counters of single launches: which points, which counters, what Nsight Compute wrote.

Counters are numbers of one launch that runs alone with cold caches. Time in a chain of launches,
where a launch begins while the one ahead still runs, is the sweep's business.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from gemm.kernels import config_of
from gemm.report import DENSE
from gemm.shapes import MODELS
from gemm.targets import checks_of

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
    "wgmma": "sm__inst_executed_pipe_tensor_op_gmma.sum",
    "ingest_bytes": "l1tex__m_xbar2l1tex_read_bytes.sum",
    "tma_bytes": "l1tex__m_xbar2l1tex_read_bytes_mem_global_op_tma_ld.sum",
    "egress_bytes": "l1tex__m_l1tex2xbar_write_bytes.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "l2_pct": f"lts__t_sectors.avg.{PEAK}",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_read_pct": f"dram__bytes_read.sum.{PEAK}",
    "dram_write_bytes": "dram__bytes_write.sum",
}
LEAST = ("ns", "cycles", "ingest_bytes", "l2_bytes", "dram_read_bytes")  # the second try's


@dataclass(frozen=True)
class Point:
    """One problem to be counted, and the scaling with which cuBLASLt was the faster there."""

    layer: str
    m: int
    dense: float
    by_row: bool


def missed_points(points: list[dict], dense: Iterable[float]) -> list[Point]:
    """Layers of a sweep's result that miss a target, alone or in a sum of their model's layers."""
    wanted: set[tuple[str, int, float]] = set()
    for point in points:
        if point["dense"] in dense and not all(check.met for check in checks_of(point)):
            one = point["kind"] == "layer"
            layers = [point["layer"]] if one else [x.label for x in MODELS[point["group"]]]
            wanted |= {(layer, point["m"], point["dense"]) for layer in layers}
    found = []
    for p in points:
        if p["kind"] == "layer" and (p["layer"], p["m"], p["dense"]) in wanted:
            us = {name: p["times"][name]["us"] for name in DENSE if name in p["times"]}
            by_row = bool(us) and min(us, key=us.__getitem__) == "cublas_row"
            found.append(Point(p["layer"], p["m"], p["dense"], by_row))
    return found


def known_metrics(listing: str) -> dict[str, str]:
    """METRICS without what `ncu --query-metrics` does not list; all where it lists nothing."""
    names = set(re.findall(r"^\s*([a-z]\w*__\w+)", listing, re.MULTILINE))
    return {key: of for key, of in METRICS.items() if not names or of.partition(".")[0] in names}


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
    """Launches in the order of the points: ours, then whatever cuBLASLt runs for the same one."""
    counted: list[dict] = []
    for launch in found:
        if OURS in launch["kernel"]:
            if len(counted) == len(points):
                break
            config = {"config": config_of(launch["kernel"])}
            counted.append(asdict(points[len(counted)]) | {"ours": launch | config, "cublas": []})
        elif counted:
            counted[-1]["cublas"].append(launch)
    return counted
