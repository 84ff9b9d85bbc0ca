# SPDX-License-Identifier: Apache-2.0
"""hybrid_gemm against what a user could pick instead: tokens x layers x dense fraction, on a GPU.

    python bench/gemm_sweep.py                                   # both models, 25 % dense
    python bench/gemm_sweep.py --dense 0.25,0,1,0.125,0.5 --budget-s 240
    python bench/gemm_sweep.py --m 1,16 --layers qwen3-32b.o 7168x2048 --dense 0,0.25
    python bench/gemm_sweep.py --m 2048,8192 --merge bench/results/gemm_h100.json
    python bench/gemm_sweep.py --configs all --m 1,2,3,8 --json configs.json   # every configuration

Every time is a median over replays of a CUDA graph that holds nothing but the launches, rivals in
turn in the same run, weights rotated over copies that exceed the L2 several times, random FP8
data. A model's line is its four layers back to back in one graph. bench/README.md has the rules.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import torch
from gemm import ceiling, report, targets
from gemm.machine import clocks, machine, short_name
from gemm.rivals import Spense, hinted
from gemm.shapes import MODELS, TOKENS, Layer, is_model, parse_layers
from gemm.timing import Recorder, rotation
from gemm.workload import RIVALS, Workload

from spense_kernels.testing.configs import gemm_configs

RESULTS = Path(__file__).resolve().parent / "results"
SETTLED_TOKENS = 256  # from here on products draw so much power that the clock depends on them
GRAPH_US = 800  # a recording lasts at least about so long
CONFIG_GRAPH_US = 250
MOST_TOKEN_TILES, FAR_BEHIND = 16, 1.8  # of a configuration that may be the fastest
MAX_LAUNCHES = 256  # of a recording
SETUP_SECONDS = 0.15  # of one point: recording, cuSPARSELt's search


class Sweep:
    """Times the points of the command line and keeps the results."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.recorder = Recorder(self.device)
        self.run = run = machine(self.device, args.commit)
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
        return time.perf_counter() - self.start > self.args.budget_s

    def estimate(self, groups: list[tuple[Layer, ...]]) -> float:
        points = sum(len(layers) + is_model(layers) for layers in groups)
        return (
            points * len(self.args.m) * len(self.args.dense) * (self.args.seconds + SETUP_SECONDS)
        )

    def rivals(self, groups: list[tuple[Layer, ...]]) -> None:
        print(f"about {self.estimate(groups):.0f} s\n{report.HEADER}", flush=True)
        done, left = [], 0
        workloads = [[self._workload(layer) for layer in layers] for layers in groups]
        self.run["missing"] = {w.layer.label: w.missing for of in workloads for w in of}
        for d in self.args.dense:
            for workload in (w for of_group in workloads for w in of_group):
                workload.set_dense(d)
            for m in self.args.m:
                for layers, of_group in zip(groups, workloads, strict=True):
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
        return Workload(layer, self.recorder, self.args.only, self.args.every_rival)

    def _point(self, layers, workloads: list[Workload], d: float, m: int) -> list[dict]:
        """One line for each layer, and for a whole model one of its layers back to back."""
        points, calls = [], []
        for layer, workload in zip(layers, workloads, strict=True):
            split = workload.split
            floor = ceiling.floor_us(layer, split, m, self.rate)
            calls.append(workload.calls(m))
            turns = {
                name: self._in_turn(name, rotation(of_rival, self.launches(floor, GRAPH_US)))
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
        passes = max(1, self.launches(total["floor_us"], GRAPH_US))
        names = set.intersection(*(set(p["times"]) for p in points))
        chains = {
            name: self._in_turn(
                name, [c[name][i % len(c[name])] for i in range(passes) for c in calls]
            )
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

    @staticmethod
    def _in_turn(name: str, calls: list) -> list:
        return hinted(calls) if name == "spense" else calls

    def _measure(
        self, workloads: list[Workload], m: int, calls: dict[str, list], passes: dict[str, int]
    ) -> dict[str, dict]:
        recordings = {}
        for name, turn in calls.items():
            try:
                recordings[name] = self.recorder.record(turn, passes[name])
            except RuntimeError as problem:
                if name == "spense":
                    raise
                for workload in workloads:
                    workload.give_up(name, m, problem)
        if m >= SETTLED_TOKENS:
            return self.recorder.measure_settled(recordings)
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
        for name, calls in self._contenders(spense, m, names).items():
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

    def _contenders(self, spense: Spense, m: int, names: list[str]) -> dict[str, list]:
        """The op's choice and every configuration but those that are far behind at once."""
        names = [name for name in names if m <= MOST_TOKEN_TILES * (token_tile(name) or m)]
        found = {"auto": spense.calls(m)} | {name: spense.calls(m, name) for name in names}
        if self.device.type == "cpu":
            return found
        for calls in found.values():
            calls[0]()
        times = self.recorder.quick([calls[:1] for calls in found.values()])
        least = min(times)
        return {
            name: calls
            for (name, calls), us in zip(found.items(), times, strict=True)
            if name == "auto" or us < FAR_BEHIND * least
        }


def token_tile(name: str) -> int | None:
    """128 of t128x128_c1k1_s5x6_f:whole; None for a name of another kind."""
    match = re.match(r"t\d+x(\d+)_", name)
    return int(match[1]) if match else None


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
    add("--seconds", type=float, default=0.08, help="replays of one line last about so long")
    add("--budget-s", type=float, default=560, help="start no new line after so many seconds")
    add("--every-rival", action="store_true", help="all rivals at every dense fraction")
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
