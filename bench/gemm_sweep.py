# SPDX-License-Identifier: Apache-2.0
"""hybrid_gemm against what a user could pick instead: tokens x layers x dense fraction, on a GPU.

    python bench/gemm_sweep.py                                   # both models, 25 % dense
    python bench/gemm_sweep.py --dense 0.25,0,1,0.125,0.5 --budget-s 240
    python bench/gemm_sweep.py --m 1,16 --layers qwen3-32b.o 7168x2048 --dense 0,0.25
    python bench/gemm_sweep.py --m 2048,8192 --merge bench/results/gemm_h100.json
    python bench/gemm_sweep.py --configs all --m 1,2,3,8 --json configs.json   # every configuration
    python bench/gemm_sweep.py --grid smooth                   # the same on a named set of problems

Every time is a median over replays of a CUDA graph that holds nothing but the launches, rivals in
turn in the same run, weights rotated over copies that exceed the L2 several times, random FP8
data. A model's line is its four layers back to back in one graph. bench/README.md has the rules.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
from gemm import ceiling, regret, report, targets
from gemm.choices import GRAPH_US, Choices, launches
from gemm.lost import DeviceLost, avoided, start_anew
from gemm.machine import add_commit, clocks, machine, short_name
from gemm.rivals import Spense
from gemm.shapes import GRIDS, MODELS, TOKENS, Layer, is_model, parse_layers
from gemm.timing import BLOCK_S, BLOCKS, Recorder, rotation
from gemm.workload import RIVALS, Workload

from spense_kernels.testing.configs import gemm_configs

RESULTS = Path(__file__).resolve().parent / "results"
SETTLED_TOKENS = 256  # from here on products draw so much power that the clock depends on them
SETUP_SECONDS = 0.15  # of one point: recording, cuSPARSELt's search


class Sweep:
    """Times the points of the command line and keeps the results."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.recorder = Recorder(self.device)
        self.run = run = machine(self.device, args.commit)
        name = run["device"]["name"]
        if self.device.type == "cuda" and not args.configs:
            run["read_bytes_per_second"] = ceiling.read_rate(self.recorder)
        self.rate = ceiling.READ_BYTES_PER_SECOND.get(name, run.get("read_bytes_per_second", 1e12))
        run["floor_bytes_per_second"] = self.rate
        self.results = report.Results(run, args.merge)
        kind = f"configs_{args.grid}" if args.grid else "gemm"
        self.file = args.json or RESULTS / f"{kind}_{short_name(name, self.device)}.json"
        measured = run.get("read_bytes_per_second", 0) / 1e12
        print(
            f"{name}, commit {run['commit']}, torch {run['versions']['torch']}; copy kernel "
            f"{measured:.2f} TB/s, floor at {self.rate / 1e12:.2f} TB/s; {run['clocks']}"
        )
        self.start = time.perf_counter()

    def out_of_time(self) -> bool:
        return time.perf_counter() - self.start > self.args.budget_s

    def estimate(self, groups: list[tuple[Layer, ...]], workloads: list[list[Workload]]) -> float:
        """Rough seconds of all points."""
        seconds = 0.0
        for d in self.args.dense:
            for layers, of_group in zip(groups, workloads, strict=True):
                of_group[0].set_dense(d)
                for m in self.args.m:
                    rivals = len(of_group[0].meant(m))
                    long = m >= SETTLED_TOKENS and self.device.type == "cuda"
                    one = rivals * BLOCKS * BLOCK_S if long else self.args.seconds
                    seconds += (len(layers) + is_model(layers)) * (one + SETUP_SECONDS)
        return seconds

    def rivals(self, groups: list[tuple[Layer, ...]]) -> None:
        done, left = [], 0
        workloads = [[self._workload(layer) for layer in layers] for layers in groups]
        print(f"about {self.estimate(groups, workloads):.0f} s\n{report.HEADER}", flush=True)
        self.run["missing"] = {w.layer.label: w.missing for of in workloads for w in of}
        self.run["avoided"] = self.args.avoid
        for d in self.args.dense:
            for workload in (w for of_group in workloads for w in of_group):
                workload.set_dense(d)
            for m in self.args.m:
                for layers, of_group in zip(groups, workloads, strict=True):
                    if there := self._done(layers, d, m):
                        done += there
                        continue
                    if self.out_of_time():
                        left += 1
                        continue
                    done += self._point(layers, of_group, d, m)
                    self.results.write(self.file)
        if left:
            print(f"--budget-s: left out {left} of the last points")
        self.run["clocks_end"] = clocks(self.device)
        self.run["missing"] = {name: why for name, why in self.run["missing"].items() if why}
        self.results.write(self.file)
        print(f"\nspeed-up over cuBLASLt FP8\n{report.summary(done)}\n\n{targets.verdict(done)}")

    def _workload(self, layer: Layer) -> Workload:
        args = self.args
        return Workload(layer, self.recorder, args.only, args.every_rival, args.avoid)

    def _done(self, layers: tuple[Layer, ...], d: float, m: int) -> list[dict]:
        """The points of a group that the sweep had timed before it started anew."""
        if self.args.resume is None:
            return []
        here = [p for p in self.results.points if p["run"] >= self.args.resume]
        here = [p for p in here if (p["m"], p["dense"]) == (m, d)]
        labels = {layer.label for layer in layers}
        found = [p for p in here if p["layer"] in labels or p["layer"] == layers[0].group]
        return found if len(found) == len(layers) + is_model(layers) else []

    def start_anew(self, lost: DeviceLost) -> None:
        """Goes on in a fresh process, from what the file holds, without what broke the GPU."""
        first = self.results.run if self.args.resume is None else self.args.resume
        avoid = avoided(self.args.avoid, lost.causes)
        if set(avoid) == set(self.args.avoid):
            raise lost  # that was not it
        print(f"{lost}; starting anew without {', '.join(avoid)}", flush=True)
        self.results.write(self.file)
        left = self.args.budget_s - (time.perf_counter() - self.start)
        words = ["--merge", self.file, "--json", self.file, "--resume", first]
        words += ["--budget-s", round(left, 1), "--avoid", *avoid]
        start_anew([*sys.argv[1:], *map(str, words)])

    def _point(self, layers, workloads: list[Workload], d: float, m: int) -> list[dict]:
        """One line for each layer, and for a whole model one of its layers back to back."""
        points, calls = [], []
        for layer, workload in zip(layers, workloads, strict=True):
            split = workload.split
            floor = ceiling.floor_us(layer, split, m, self.rate)
            calls.append(workload.calls(m))
            turns = {
                name: rotation(of_rival, launches(self.recorder, floor, GRAPH_US))
                for name, of_rival in calls[-1].items()
            }
            facts = {"n": layer.n, "k": layer.k, "packed_bytes": split.packed_bytes}
            points.append(
                {"kind": "layer", "layer": layer.label, "group": layer.group, "m": m, "dense": d}
                | {"dense_fraction": split.dense_fraction, "floor_us": round(floor, 3)}
                | {"flops": 2 * m * layer.n * layer.k, "bytes": ceiling.bytes_moved(split, m)}
                | facts
                | {
                    "times": self._measure(
                        [workload], m, turns, {n: len(c) for n, c in turns.items()}
                    )
                }
            )
            self._report(points[-1])
        if is_model(layers):
            points.append(self._model(workloads, points, calls))
            self._report(points[-1])
        return points

    def _model(self, workloads: list[Workload], points: list[dict], calls: list[dict]) -> dict:
        first = points[0]
        total = {key: sum(p[key] for p in points) for key in ("floor_us", "flops", "bytes")}
        passes = launches(self.recorder, total["floor_us"], GRAPH_US)
        names = set.intersection(*(set(p["times"]) for p in points))
        chains = {
            name: [c[name][i % len(c[name])] for i in range(passes) for c in calls]
            for name in calls[0]
            if name in names
        }
        weights = sum(p["n"] * p["k"] for p in points)
        dense = sum(p["dense_fraction"] * p["n"] * p["k"] for p in points) / weights
        return (
            {"kind": "model", "layer": first["group"], "group": first["group"], "m": first["m"]}
            | {"dense": first["dense"], "dense_fraction": dense}
            | total
            | {"packed_bytes": sum(p["packed_bytes"] for p in points)}
            | {"times": self._measure(workloads, first["m"], chains, dict.fromkeys(chains, passes))}
        )

    def _measure(
        self, workloads: list[Workload], m: int, calls: dict[str, list], passes: dict[str, int]
    ) -> dict[str, dict]:
        recordings = {}
        for name, turn in calls.items():
            try:
                recordings[name] = self.recorder.record(turn, passes[name])
            except RuntimeError as problem:
                workloads[0].check()
                if name == "spense":
                    raise
                for workload in workloads:
                    workload.give_up(name, m, problem)
        try:
            if m >= SETTLED_TOKENS:
                return self.recorder.measure_settled(recordings)
            return self.recorder.measure(recordings, self.args.seconds)
        except RuntimeError:
            for workload in workloads:
                workload.check()
            raise

    def _report(self, point: dict) -> None:
        self.results.add_point(point)
        print(report.line(point), flush=True)

    def configs(self, groups: list[tuple[Layer, ...]]) -> None:
        names = gemm_configs(str(self.device))
        if self.args.configs != ["all"]:
            names = self.args.configs
        print(f"configurations: {', '.join(names)}", flush=True)
        choices, left = Choices(self.recorder, names, self.rate), 0
        for layers, d in itertools.product(groups, self.args.dense):
            of_group = [Spense(layer, d, self.device) for layer in layers]
            model = of_group if is_model(layers) else []
            for spense, m in itertools.product(of_group, self.args.m):
                if self.out_of_time():
                    left += 1
                    continue
                layer = spense.layer
                shape = {"layer": layer.label, "n": layer.n, "k": layer.k, "dense": d}
                shape["packed_bytes"] = spense.split.packed_bytes
                # Larger products fill the device, and differences of passes drown in their noise.
                among = model if m < SETTLED_TOKENS else []
                for name, times in choices.measure(spense, m, among).items():
                    self.results.add_config(shape | {"m": m, "config": name} | times)
            self.results.write(self.file)
        if left:
            print(f"--budget-s: left out {left} problems")
        self.run["clocks_end"] = clocks(self.device)
        self.results.write(self.file)
        print(regret.summary(regret.points(self.results.body())))


def numbers(kind: type):
    return lambda text: [kind(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--m", type=numbers(int), default=TOKENS, help="tokens, as 1,16,4096")
    add("--layers", nargs="+", default=list(MODELS), help="a model, one of its layers, NxK")
    add("--dense", type=numbers(float), default=[0.25], help="dense fractions, as 0,0.25,1")
    add("--only", type=numbers(str), default=list(RIVALS), help="rivals, as spense,cublas_tensor")
    add("--configs", type=numbers(str), help="time configurations instead: all, or their names")
    add("--grid", choices=list(GRIDS), help="--configs all on these --layers, --m and --dense")
    add("--seconds", type=float, default=0.08, help="replays of one line last about so long")
    add("--budget-s", type=float, default=560, help="start no new line after so many seconds")
    add("--every-rival", action="store_true", help="all rivals at every dense fraction")
    add("--avoid", nargs="*", default=[], help="of cuSPARSELt: NxK or NxK:ALGORITHM")
    add("--resume", type=int, help="keep the points of the file's runs from this number on")
    add("--merge", type=Path, nargs="+", default=[], help="result files to start from")
    add("--json", type=Path, help="where to write; by default in bench/results")
    add_commit(parser)
    add("--device", default="cuda", help="cpu tries the logic")
    args = parser.parse_args()
    if args.grid:
        vars(args).update(vars(GRIDS[args.grid]))
        args.configs = args.configs or ["all"]
    torch.manual_seed(0)
    sweep = Sweep(args)
    try:
        (sweep.configs if args.configs else sweep.rivals)(parse_layers(args.layers))
    except DeviceLost as lost:
        sweep.start_anew(lost)
    print(f"{time.perf_counter() - sweep.start:.0f} s; wrote {sweep.file}")


if __name__ == "__main__":
    main()
