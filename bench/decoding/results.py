# SPDX-License-Identifier: Apache-2.0
"""Lines, speed-ups and the result file of decode.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

KEY = ("model", "kind", "dense", "what", "batch", "context", "cache")


def key_of(point: dict) -> tuple:
    """What a newer point takes the place of; each run keeps the dense points it compares with."""
    return (*(point[name] for name in KEY), point["ms"] if point["kind"] == "dense" else None)


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
    """Runs (where and when) and points that name their run by number; written after every point."""

    def __init__(self, path: Path | None, run: dict, merged: list[Path]):
        self.path = path
        self.runs: list[dict] = []
        self.points: list[dict] = []
        for other in merged:
            data = json.loads(other.read_text())
            shift = len(self.runs)
            self.runs += data["runs"]
            for point in data["points"]:
                self._put(point | {"run": point["run"] + shift})
        self.run = len(self.runs)
        self.runs.append(run)

    def add(self, point: dict) -> dict:
        point = point | {"run": self.run}
        self._put(point)
        self.write()
        return point

    def _put(self, point: dict) -> None:
        """Takes the place of an older point for the same thing."""
        self.points = [old for old in self.points if key_of(old) != key_of(point)]
        self.points.append(point)

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(self.path.name + ".new")
        rows = {"runs": self.runs, "points": self.points}
        text = ",\n".join(
            f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in entries) + "\n]"
            for name, entries in rows.items()
        )
        fresh.write_text("{\n" + text + "\n}\n")
        os.replace(fresh, self.path)
