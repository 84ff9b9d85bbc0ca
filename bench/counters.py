# SPDX-License-Identifier: Apache-2.0
"""Counts with Nsight Compute what limits the points at which a sweep misses its targets.

    python bench/counters.py                        # those of bench/results/gemm_h100.json
    python bench/counters.py --sweep sweep.json --json counters.json --budget-s 60

One process runs every point under `ncu`: our kernel once, then cuBLASLt's, each after a launch that
is not counted, clocks left alone. docs/sm90.md has the table (bench/readme.py writes it).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gemm import counters
from gemm.machine import add_commit, machine, short_name
from gemm.nvcc import toolkit_program
from gemm.report import write_points
from gemm.rivals import CublasLt, Spense
from gemm.shapes import MODELS

RESULTS = Path(__file__).resolve().parent / "results"
# The tokens that say most come first, should the time not do for all.
ORDER = [256, 512, 1024, 2048, 128, 64, 4096, 32, 8192, 16, 8, 1]


def ncu() -> str:
    return toolkit_program("ncu", "ncu (Nsight Compute)")


def work(points: list[counters.Point], budget_s: float, device: torch.device) -> None:
    """Launches every point; on a GPU the profiler is on for the launches that count alone."""
    layers = {layer.label: layer for of in MODELS.values() for layer in of}
    weights: dict[tuple[str, float], Spense] = {}
    rivals: dict[str, CublasLt] = {}
    start = time.perf_counter()
    for number, point in enumerate(points):
        if time.perf_counter() - start > budget_s:
            print(f"--budget-s: left out {len(points) - number} points")
            break
        layer, key = layers[point.layer], (point.layer, point.dense)
        if key not in weights:
            weights[key] = Spense(layer, point.dense, device)
        if point.layer not in rivals:
            rivals[point.layer] = CublasLt(layer, device)
        rival = rivals[point.layer].calls(point.m, by_row=point.by_row)
        for call in (weights[key].calls(point.m)[0], rival[0]):
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.profiler.start()
                call()
                torch.cuda.synchronize(device)
                torch.cuda.profiler.stop()


def count(args: argparse.Namespace, metrics: dict[str, str], points: Path, log: Path) -> int:
    """Runs the work under ncu, whose output goes into `log`."""
    command = [ncu(), "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    command += ["--force-overwrite", "--profile-from-start", "off", "--clock-control", "none"]
    command += ["--metrics", ",".join(metrics.values()), sys.executable, __file__]
    command += ["--work", str(points), "--budget-s", str(args.budget_s)]
    command += ["--device", args.device]
    print(" ".join(command), flush=True)
    log.unlink(missing_ok=True)
    return subprocess.run(command).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", type=Path, help="a result file of gemm_sweep.py")
    parser.add_argument("--dense", default="0.25", help="dense fractions, as 0,0.25")
    parser.add_argument("--budget-s", type=float, default=60, help="start no point after so long")
    parser.add_argument("--json", type=Path, help="where results go; the raw log lies beside")
    add_commit(parser)
    parser.add_argument("--device", default="cuda", help="cpu: to try it without an ncu")
    parser.add_argument("--work", type=Path, help="only the launches of the points in this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.work:
        points = [counters.Point(**point) for point in json.loads(args.work.read_text())]
        work(points, args.budget_s, device)
        return 0
    run = machine(device, args.commit)
    name = short_name(run["device"]["name"], device)
    sweep = json.loads((args.sweep or RESULTS / f"gemm_{name}.json").read_text())
    dense = [float(word) for word in args.dense.split(",")]
    points = counters.missed_points(sweep["points"], dense)
    points.sort(key=lambda p: ORDER.index(p.m) if p.m in ORDER else len(ORDER))
    file = args.json or RESULTS / f"counters_{name}.json"
    log = file.with_suffix(".csv")
    listing = subprocess.run([ncu(), "--query-metrics"], capture_output=True, text=True).stdout
    metrics = counters.known_metrics(listing)
    missing = [of for key, of in counters.METRICS.items() if key not in metrics]
    print(f"{len(points)} points; counters that this ncu lacks: {missing}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        todo = Path(folder) / "points.json"
        todo.write_text(json.dumps([vars(point) for point in points]))
        code = count(args, metrics, todo, log)
        found = counters.launches(log.read_text() if log.is_file() else "", metrics)
        if not found:
            print(f"ncu ended with {code} and no launch; once more with fewer counters")
            metrics = {key: counters.METRICS[key] for key in counters.LEAST}
            code = count(args, metrics, todo, log)
            found = counters.launches(log.read_text() if log.is_file() else "", metrics)
    counted = counters.by_point(points, found)
    write_points(file, run | {"counters": metrics, "missing": missing}, counted)
    print(f"ncu ended with {code}; {len(counted)} of {len(points)} points; wrote {file}")
    return int(len(counted) < len(points))


if __name__ == "__main__":
    sys.exit(main())
