# SPDX-License-Identifier: Apache-2.0
"""Counts with Nsight Compute what limits the points at which a sweep misses its targets.

    python bench/counters.py                        # those of bench/results/gemm_h100.json
    python bench/counters.py --sweep sweep.json --json counters.json --budget-s 60

One process runs every point under `ncu`: our kernel once, then the rival's (cuBLASLt's, at 0 %
dense cuSPARSELt's; once for all dense fractions), each after a launch that is not counted, clocks
left alone. docs/sm90-misses.md has the table (bench/readme.py writes it), where points that the
time left out stand without counters.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gemm import counters
from gemm.machine import add_commit, machine, short_name
from gemm.nvcc import toolkit_program
from gemm.report import write_points
from gemm.rivals import CublasLt, CusparseLt, Spense
from gemm.shapes import MODELS
from gemm.timing import Call, Recorder

RESULTS = Path(__file__).resolve().parent / "results"


def ncu() -> str:
    return toolkit_program("ncu", "ncu (Nsight Compute)")


class Work:
    """Launches points; on a GPU the profiler is on for the launches that count alone."""

    def __init__(self, device: torch.device, avoid: list[str]):
        self.device, self.avoid = device, avoid
        self.layers = {layer.label: layer for of in MODELS.values() for layer in of}
        self._made: dict[tuple, Spense | CublasLt | CusparseLt] = {}
        self._counted: set[tuple] = set()  # of rivals

    def launch(self, points: list[counters.Point], budget_s: float) -> Iterator[counters.Point]:
        """Each point when ours has been launched, before its rival is, which may be the end."""
        start = time.perf_counter()
        for number, point in enumerate(points):
            if time.perf_counter() - start > budget_s:
                print(f"--budget-s: left out {len(points) - number} points:")
                for left in points[number:]:
                    print(f"  {left.layer}, M = {left.m}, {left.dense:.3g} dense")
                return
            self._counted_call(self._spense(point).calls(point.m)[0])
            yield point
            if point.rival_work not in self._counted:
                self._counted.add(point.rival_work)
                self._rival(point)

    def _counted_call(self, call: Call) -> None:
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize(self.device)
            torch.cuda.profiler.stop()

    def _spense(self, point: counters.Point) -> Spense:
        return self._get(Spense, point, point.dense, device=self.device, count=1)

    def _rival(self, point: counters.Point) -> None:
        if point.rival != "cusparselt":
            rival = self._get(CublasLt, point, device=self.device, count=1)
            by_row = point.rival == "cublas_row"
            return self._counted_call(rival.calls(point.m, by_row=by_row)[0])
        try:
            quick = Recorder(self.device).quick
            rival = self._get(CusparseLt, point, device=self.device, quick=quick, avoid=self.avoid)
            self._counted_call(rival.calls(point.m)[0])
        except Exception as problem:  # whatever the library comes up with
            print(f"{point.layer}, M = {point.m}: no cuSPARSELt: {problem!r:.300}")

    def _get(self, make: type, point: counters.Point, *args, **kwargs):
        key = make, point.layer, *args
        if key not in self._made:
            self._made[key] = make(self.layers[point.layer], *args, **kwargs)
        return self._made[key]


def count(args: argparse.Namespace, metrics: dict[str, str], points: Path, log: Path) -> int:
    """Runs the work under ncu, whose output goes into `log`; `points` then holds what was run."""
    command = [ncu(), "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    command += ["--force-overwrite", "--profile-from-start", "off", "--clock-control", "none"]
    command += ["--metrics", ",".join(metrics.values()), sys.executable, __file__]
    command += ["--work", str(points), "--budget-s", str(args.budget_s)]
    command += ["--device", args.device, "--avoid", *args.avoid]
    print(" ".join(command), flush=True)
    log.unlink(missing_ok=True)
    return subprocess.run(command).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", type=Path, help="a result file of gemm_sweep.py")
    parser.add_argument("--dense", help="dense fractions, as 0.25,1; all by default")
    parser.add_argument("--budget-s", type=float, default=60, help="start no point after so long")
    parser.add_argument("--avoid", nargs="*", default=[], help="of cuSPARSELt, beside the sweep's")
    parser.add_argument("--json", type=Path, help="where results go; the raw log lies beside")
    add_commit(parser)
    parser.add_argument("--device", default="cuda", help="cpu: to try it without an ncu")
    parser.add_argument("--work", type=Path, help="only the launches of the points in this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.work:
        points, done = _read(args.work), []
        _write(args.work, done)
        for point in Work(device, args.avoid).launch(points, args.budget_s):
            done.append(point)
            _write(args.work, done)
        return 0
    run = machine(device, args.commit)
    name = short_name(run["device"]["name"], device)
    sweep = json.loads((args.sweep or RESULTS / f"gemm_{name}.json").read_text())
    args.avoid += [word for of in sweep["runs"] for word in of.get("avoided", [])]
    dense = [float(word) for word in args.dense.split(",")] if args.dense else None
    points = counters.missed_points(sweep["points"], dense)
    file = args.json or RESULTS / f"counters_{name}.json"
    log = file.with_suffix(".csv")
    listing = subprocess.run([ncu(), "--query-metrics"], capture_output=True, text=True).stdout
    metrics = counters.known_metrics(listing)
    missing = [of for key, of in counters.METRICS.items() if key not in metrics]
    print(f"{len(points)} points; counters that are left out: {missing}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        todo = Path(folder) / "points.json"
        for asked in (metrics, {key: counters.METRICS[key] for key in counters.LEAST}):
            _write(todo, points)
            code = count(args, asked, todo, log)
            found = counters.launches(log.read_text() if log.is_file() else "", asked)
            if found:
                break
            print(f"ncu ended with {code} and no launch", flush=True)
        counted = counters.by_point(_read(todo) if found else [], found)
    write_points(file, run | {"counters": asked, "missing": missing}, counted)
    print(f"ncu ended with {code}; {len(counted)} of {len(points)} points; wrote {file}")
    return int(code != 0 or not counted)


def _read(file: Path) -> list[counters.Point]:
    return [counters.Point(**point) for point in json.loads(file.read_text())]


def _write(file: Path, points: list[counters.Point]) -> None:
    file.write_text(json.dumps([vars(point) for point in points]))


if __name__ == "__main__":
    sys.exit(main())
