# SPDX-License-Identifier: Apache-2.0
"""Lines, summaries and the JSON file of the sweep."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

DENSE = ("cublas_tensor", "cublas_row")  # the faster of both scalings counts
COPY = ("copy_1", "copy_2")
RATIOS = (
    ("x cublas", DENSE),
    ("x bf16", ("bf16",)),
    ("x 2:4", ("cusparselt",)),
    ("x two", ("two_library",)),
    ("x two+", ("two_library_add",)),
)

HEADER = (
    f"{'layer':<20} {'n x k':>12} {'M':>5} {'dense':>6} | {'us':>8} {'TFLOP/s':>8} {'GB/s':>6} "
    f"{'%floor':>6} {'%copy':>6} | " + " ".join(f"{title:>8}" for title, _ in RATIOS) + " | spread"
)


def best(times: dict[str, dict], names: tuple[str, ...]) -> float | None:
    """Microseconds of the fastest of those that were timed."""
    found = [times[name]["us"] for name in names if name in times]
    return min(found) if found else None


def speed_up(point: dict, names: tuple[str, ...] = DENSE) -> float | None:
    """How many times faster ours is than the fastest of `names`."""
    rival = best(point["times"], names)
    return rival / point["times"]["spense"]["us"] if rival and "spense" in point["times"] else None


def line(point: dict) -> str:
    """One aligned line; TFLOP/s counts every weight, pruned ones too, GB/s what is moved."""
    times = point["times"]
    us = times["spense"]["us"] if "spense" in times else float("nan")
    copy = best(times, COPY)
    shape = f"{point['n']} x {point['k']}" if "n" in point else ""
    ratios = [speed_up(point, names) for _, names in RATIOS]
    return (
        f"{point['layer']:<20} {shape:>12} {point['m']:>5} {point['dense_fraction']:>6.1%} | "
        f"{us:>8.2f} {point['flops'] / us / 1e6:>8.1f} {point['bytes'] / us / 1e3:>6.0f} "
        f"{100 * point['floor_us'] / us:>6.1f} {_cell(copy and 100 * copy / us, 6, 1)} | "
        + " ".join(_cell(ratio, 8, 2) for ratio in ratios)
        + f" | {max(t['spread'] for t in times.values()):.1%}"
    )


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def summary(points: list[dict]) -> str:
    """For every M and dense fraction: speed-up over cuBLASLt, geometric mean over layers, the
    lowest of them, and each model's sum."""
    keys = sorted({(p["dense"], p["m"]) for p in points})
    sums = sorted({p["layer"] for p in points if p["kind"] == "model"})
    lines = [f"{'dense':>6} {'M':>5} | {'geomean':>8} {'lowest':>8} | " + " ".join(sums)]
    for dense, m in keys:
        here = [p for p in points if (p["dense"], p["m"]) == (dense, m)]
        ratios = [r for p in here if p["kind"] == "layer" and (r := speed_up(p))]
        of_model = {p["layer"]: speed_up(p) for p in here if p["kind"] == "model"}
        mean = statistics.geometric_mean(ratios) if ratios else None
        lines.append(
            f"{dense:>6.0%} {m:>5} | {_cell(mean, 8, 3)} {_cell(min(ratios, default=None), 8, 3)} "
            "| " + " ".join(_cell(of_model.get(name), len(name), 3) for name in sums)
        )
    return "\n".join(lines)


class Results:
    """The result file: runs (where and when) and points that name their run by number."""

    def __init__(self, run: dict, merged: list[Path]):
        self.runs: list[dict] = []
        self._points: dict[tuple, dict] = {}
        self._configs: dict[tuple, dict] = {}
        for path in merged:
            self._add(json.loads(path.read_text()))
        self.run = len(self.runs)
        self.runs.append(run)

    @property
    def points(self) -> list[dict]:
        return list(self._points.values())

    @property
    def configs(self) -> list[dict]:
        return list(self._configs.values())

    def body(self) -> dict[str, list[dict]]:
        """What the file holds."""
        return {"runs": self.runs, "points": self.points, "configs": self.configs}

    def _add(self, other: dict) -> None:
        shift = len(self.runs)
        self.runs += other["runs"]
        for name, entries in (("points", self._points), ("configs", self._configs)):
            for entry in other[name]:
                self._put(entries, entry | {"run": entry["run"] + shift})

    def add_point(self, point: dict) -> None:
        self._put(self._points, point | {"run": self.run})

    def add_config(self, entry: dict) -> None:
        self._put(self._configs, entry | {"run": self.run})

    @staticmethod
    def _put(entries: dict[tuple, dict], entry: dict) -> None:
        """A newer entry of the same problem on the same kind of point takes the older's place."""
        key = tuple(entry.get(name) for name in ("layer", "m", "dense", "config"))
        entries.pop(key, None)
        entries[key] = entry

    def write(self, path: Path) -> None:
        """Whole or not at all. Runs that no entry names any more stay, as a record."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")
        lines = [f'"{name}": [\n' + _rows(rows) + "]" for name, rows in self.body().items()]
        fresh.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(fresh, path)


def write_points(path: Path, run: dict, points: list[dict]) -> None:
    """One run and its points."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"run": {json.dumps(run)},\n"points": [\n{_rows(points)}]}}\n')


def _rows(rows: list[dict]) -> str:
    """One entry a line, so that a diff shows which moved."""
    return ",\n".join(json.dumps(row) for row in rows) + ("\n" if rows else "")
