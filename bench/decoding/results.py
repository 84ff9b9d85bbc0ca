# SPDX-License-Identifier: Apache-2.0
"""Lines, speed-ups and the result file of decode.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

KEY = ("model", "kind", "dense", "what", "batch", "context", "cache")


def key_of(point: dict) -> tuple:
    return tuple(point[name] for name in KEY)


def rival_of(point: dict, points: list[dict]) -> dict | None:
    """The dense point of the same run that this one is to be compared with."""
    same = ("model", "what", "batch", "context", "cache", "run")
    for other in points:
        if other["kind"] == "dense" and all(other[name] == point[name] for name in same):
            return other
    return None


def speed_up(point: dict, points: list[dict]) -> float | None:
    rival = rival_of(point, points)
    return rival["ms"] / point["ms"] if rival else None


PARTS = {
    "linear": "linear",
    "attention": "attn",
    "quantise": "quant",
    "head": "head",
    "rest": "rest",
}
HEADER = " ".join(
    (
        f"{'model':<13} {'what':<8} {'kind':<12} {'dense':>6} {'batch':>5} {'context':>7}",
        f"{'cache':>5} | {'ms':>8} {'tokens/s':>9} {'x dense':>7} |",
        *(f"{title:>7}" for title in PARTS.values()),
        f"| {'GiB':>5} attention",
    )
)


def line(point: dict, points: list[dict]) -> str:
    ratio = speed_up(point, points)
    dense = "" if point["dense"] is None else f"{point['dense']:.1%}"
    parts = point.get("parts_ms") or {}
    return " ".join(
        (
            f"{point['model']:<13} {point['what']:<8} {point['kind']:<12} {dense:>6}",
            f"{point['batch']:>5} {point['context']:>7} {point['cache']:>5} |",
            f"{point['ms']:>8.3f} {point['tokens_per_s']:>9.0f}",
            f"{'-' if ratio is None else format(ratio, '.3f'):>7} |",
            *(f"{parts[p]:>7.3f}" if p in parts else f"{'-':>7}" for p in PARTS),
            f"| {point['peak_gib']:>5.1f} {point['attention']}",
        )
    )


class Results:
    """Runs (where and when) and points that name their run by number; written after every point.

    Of several points for the same thing the newest is written, by the time its run began, and of
    the dense model also those that another point which is written is compared with.
    """

    def __init__(self, path: Path | None, run: dict, merged: list[Path]):
        self.path = path
        self.runs: list[dict] = []
        self.points: list[dict] = []
        for other in merged:
            data = json.loads(other.read_text())
            self.runs += [each for each in data["runs"] if each not in self.runs]
            for point in data["points"]:
                self._put(point | {"run": self.runs.index(data["runs"][point["run"]])})
        self.run = len(self.runs)
        self.runs.append(run)

    def add(self, point: dict) -> dict:
        point = point | {"run": self.run}
        self._put(point)
        self.write()
        return point

    def _put(self, point: dict) -> None:
        self.points = [p for p in self.points if self._place(p) != self._place(point)]
        self.points.append(point)

    def _kept(self) -> list[dict]:
        newest: dict[tuple, dict] = {}
        for each in self.points:
            other = newest.setdefault(key_of(each), each)
            if self._began(each) >= self._began(other):
                newest[key_of(each)] = each
        kept = [self._place(p) for p in newest.values()]
        kept += [self._place(r) for p in newest.values() if (r := rival_of(p, self.points))]
        return [p for p in self.points if self._place(p) in kept]

    def _place(self, point: dict) -> tuple:
        return (*key_of(point), point["run"])

    def _began(self, point: dict) -> str:
        return self.runs[point["run"]]["created"]

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(self.path.name + ".new")
        kept = self._kept()
        used = sorted({point["run"] for point in kept})
        points = [point | {"run": used.index(point["run"])} for point in kept]
        rows = {"runs": [self.runs[run] for run in used], "points": points}
        text = ",\n".join(
            f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in entries) + "\n]"
            for name, entries in rows.items()
        )
        fresh.write_text("{\n" + text + "\n}\n")
        os.replace(fresh, self.path)
