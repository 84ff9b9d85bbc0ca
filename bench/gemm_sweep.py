# SPDX-License-Identifier: Apache-2.0
"""hybrid_gemm against what a user could pick instead: tokens x layers x dense fraction, on a GPU.

    python bench/gemm_sweep.py                                   # both models, 25 % dense
    python bench/gemm_sweep.py --m 1,16 --layers qwen3-32b.o 7168x2048 --dense 0,0.25
    python bench/gemm_sweep.py --m 2048,8192 --merge bench/results/gemm_h100.json
    python bench/gemm_sweep.py --configs all --m 1,2,3,8 --json configs.json   # every configuration

Every time is a median over replays of a CUDA graph that holds nothing but the launches, rivals in
turn in the same run, weights rotated over copies that exceed the L2 several times, random FP8
data. A model's line is its four layers back to back in one graph. bench/README.md has the rules.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from gemm import ceiling, report, targets
from gemm.machine import clocks, machine, short_name
from gemm.rivals import Spense
from gemm.shapes import MODELS, TOKENS, Layer, is_model, parse_layers
from gemm.timing import Recorder, rotation
from gemm.workload import RIVALS, Workload

from spense_kernels.testing.configs import gemm_configs

RESULTS = Path(__file__).resolve().parent / "results"
GRAPH_US = 800  # a recording lasts at least about so long
CONFIG_GRAPH_US = 250
MAX_LAUNCHES = 256  # of a recording
SETUP_SECONDS = 0.8  # of one point, by experience: recording, cuSPARSELt's search


class Sweep:
    """Times the points of the command line and keeps the results."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.recorder = Recorder(self.device)
        run = machine(self.device, args.commit)
        if self.device.type == "cuda":
            run["read_bytes_per_second"] = ceiling.read_rate(self.recorder)
        name = run["device"]["name"]
        self.rate = ceiling.READ_BYTES_PER_SECOND.get(name, run.get("read_bytes_per_second", 1e11))
        run["floor_bytes_per_second"] = self.rate
        self.results = report.Results(run, args.merge)
        self.file = args.json or RESULTS / f"gemm_{short_name(name, self.device)}.json"
        measured = run.get("read_bytes_per_second", 0) / 1e12
        print(
            f"{name}, commit {run['commit']}, torch {run['versions']['torch']}; copy kernel "
            f"{measured:.2f} TB/s, floor at {self.rate / 1e12:.2f} TB/s; {run['clocks']}"
        )
        self.start = time.perf_counter()

    def launches(self, floor_us: float, us: float) -> int:
        """Launches that take about `us`; one where only the logic is tried."""
        return min(round(us / floor_us), MAX_LAUNCHES) if self.device.type == "cuda" else 1

    def out_of_time(self) -> bool:
        return time.perf_counter() - self.start > self.args.limit

    def estimate(self, groups: list[tuple[Layer, ...]]) -> float:
        points = sum(len(layers) + is_model(layers) for layers in groups)
        return (
            points * len(self.args.m) * len(self.args.dense) * (self.args.seconds + SETUP_SECONDS)
        )

    def rivals(self, groups: list[tuple[Layer, ...]]) -> None:
        print(f"about {self.estimate(groups):.0f} s\n{report.HEADER}", flush=True)
        done = []
        for layers in groups:
            workloads = [Workload(x, self.recorder, self.args.only) for x in layers]
            for d in self.args.dense:
                for workload in workloads:
                    workload.set_dense(d)
                for m in self.args.m:
                    if self.out_of_time():
                        print(f"--limit: left out {layers[0].group or layers[0].name} {d} {m}")
                        continue
                    done += self._point(layers, workloads, d, m)
                    self.results.write(self.file)
        self.results.runs[self.results.run]["clocks_end"] = clocks(self.device)
        self.results.write(self.file)
        print(f"\nspeed-up over cuBLASLt FP8\n{report.summary(done)}\n\n{targets.verdict(done)}")

    def _point(self, layers, workloads: list[Workload], d: float, m: int) -> list[dict]:
        """One line for each layer, and for a whole model one of its layers back to back."""
        points, calls = [], []
        for layer, workload in zip(layers, workloads, strict=True):
            split = workload.split
            floor = ceiling.floor_us(layer, split, m, self.rate)
            calls.append(workload.calls(m))
            turns = {
                name: rotation(of_rival, self.launches(floor, GRAPH_US))
                for name, of_rival in calls[-1].items()
            }
            facts = {"n": layer.n, "k": layer.k, "packed_bytes": split.packed_bytes}
            points.append(
                {"kind": "layer", "layer": layer.label, "group": layer.group, "m": m, "dense": d}
                | {"dense_fraction": split.dense_fraction, "floor_us": round(floor, 3)}
                | {"flops": 2 * m * layer.n * layer.k, "bytes": ceiling.bytes_moved(split, m)}
                | facts
                | {"times": self._measure(turns, {name: len(c) for name, c in turns.items()})}
            )
            self._report(points[-1])
        if is_model(layers):
            points.append(self._model(points, calls))
            self._report(points[-1])
        return points

    def _model(self, points: list[dict], calls: list[dict]) -> dict:
        first = points[0]
        total = {key: sum(p[key] for p in points) for key in ("floor_us", "flops", "bytes")}
        passes = max(1, self.launches(total["floor_us"], GRAPH_US))
        names = set.intersection(*(set(c) for c in calls))
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
            | {"times": self._measure(chains, dict.fromkeys(chains, passes))}
        )

    def _measure(self, calls: dict[str, list], passes: dict[str, int]) -> dict[str, dict]:
        recordings = {
            name: self.recorder.record(turn, passes[name]) for name, turn in calls.items()
        }
        return self.recorder.measure(recordings, self.args.seconds)

    def _report(self, point: dict) -> None:
        self.results.add_point(point)
        print(report.line(point), flush=True)

    def configs(self, groups: list[tuple[Layer, ...]]) -> None:
        names = gemm_configs(str(self.device))
        if self.args.configs != ["all"]:
            names = self.args.configs
        print(f"configurations: {', '.join(names)}", flush=True)
        worst = []
        for layer in (layer for layers in groups for layer in layers):
            for d in self.args.dense:
                spense = Spense(layer, d, self.device)
                for m in self.args.m:
                    if not self.out_of_time():
                        worst.append(self._configs_of(spense, d, m, names))
                self.results.write(self.file)
        worst.sort(reverse=True)
        print(f"regret: mean {sum(worst) / max(1, len(worst)):.2%}, worst {worst[:5]}")

    def _configs_of(self, spense: Spense, d: float, m: int, names: list[str]) -> float:
        layer = spense.layer
        floor = ceiling.floor_us(layer, spense.split, m, self.rate)
        recordings = {}
        for name in ("auto", *names):
            calls = spense.calls(m, None if name == "auto" else name)
            turn = rotation(calls, self.launches(floor, CONFIG_GRAPH_US))
            try:
                recordings[name] = self.recorder.record(turn, len(turn))
            except RuntimeError as problem:
                print(f"{layer.label}, M = {m}: not {name}: {problem!s:.200}")
        times = self.recorder.measure(recordings, seconds=0, min_rounds=5)
        shape = {"layer": layer.label, "n": layer.n, "k": layer.k, "m": m, "dense": d}
        for name, summary in times.items():
            facts = {"packed_bytes": spense.split.packed_bytes, "config": name}
            self.results.add_config(shape | facts | summary)
        text, regret = report.regret_line(layer.label, m, d, times)
        print(text, flush=True)
        return regret


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
    add("--seconds", type=float, default=0.35, help="replays of one line last about so long")
    add("--limit", type=float, default=560, help="start no new line after so many seconds")
    add("--merge", type=Path, nargs="+", default=[], help="result files to start from")
    add("--json", type=Path, help="where to write; by default bench/results/gemm_<device>.json")
    add("--commit", help="what was built, where git cannot tell")
    add("--device", default="cuda", help="cpu tries the logic")
    args = parser.parse_args()
    torch.manual_seed(0)
    sweep = Sweep(args)
    (sweep.configs if args.configs else sweep.rivals)(parse_layers(args.layers))
    print(f"{time.perf_counter() - sweep.start:.0f} s; wrote {sweep.file}")


if __name__ == "__main__":
    main()
