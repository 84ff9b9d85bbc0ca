# SPDX-License-Identifier: Apache-2.0
"""Whole-model decoding on one GPU: a CUDA-graphed step with a static cache, and a prompt.

    python bench/decode.py --models qwen3-32b --out bench/results/decode.json
    python bench/decode.py --models seed-oss-36b --cache fp8 --batch 64 128 \\
        --out bench/results/decode.json --merge bench/results/decode.json

Weights, cache and tokens are random, of the real shapes, all layers. What does not fit the card is
named and left out. Every run times the dense model first, so that speed-ups compare what ran on one
warm card, and chooses the attention once for all kinds of linear layers, by what it makes of a step
of the first. The file is written after every point. The parts are timed alone, so they lack what
kernels that follow one another cost or save; `--timeline` shows that. A prompt is long enough to
make a card lower its clock: each of its recordings runs by itself until that has settled.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from decoding import timeline
from decoding.attention import Attention, fastest
from decoding.inputs import inputs_of
from decoding.linears import KINDS, factory
from decoding.models import MODELS, ModelShape
from decoding.results import HEADER, Results, line
from decoding.step import PARTS, Cache, Step, Weights
from gemm.machine import add_commit, clocks, machine
from gemm.timing import Recorder, Recording

CACHES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
GIB = 1 << 30
FEW_LAYERS = 8  # of a step by which the attention is chosen


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["qwen3-32b"], choices=MODELS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument(
        "--dense", nargs="+", type=float, default=[0.25], help="dense fractions, ours"
    )
    parser.add_argument("--rival-dense", nargs="+", type=float, default=[0.25], help="two_library")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64, 128])
    parser.add_argument("--context", nargs="+", type=int, default=[1024])
    parser.add_argument("--cache", nargs="+", default=list(CACHES), choices=CACHES)
    parser.add_argument("--prefill", nargs="*", type=int, default=[2048], help="prompt lengths")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to try things")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-parts", action="store_true", help="leave the breakdown out")
    parser.add_argument(
        "--timeline", action="store_true", help="what every kernel adds, and a trace of a layer"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.15, help="replays of one step, or part, go on so long"
    )
    parser.add_argument("--stop-after", type=float, help="seconds after which no point begins")
    parser.add_argument("--out", type=Path)
    add_commit(parser)
    parser.add_argument("--merge", nargs="*", type=Path, default=[], help="older result files")
    parser.add_argument("--merge-only", action="store_true", help="write --out and time nothing")
    return parser.parse_args(arguments)


class Runner:
    """Times steps of one device and keeps them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.recorder = Recorder(self.device)
        self.failures = 0
        self.results = Results(args.out, machine(self.device, args.commit), args.merge)
        self.start = time.perf_counter()
        # What a step attends over -> name and function of the attention.
        self.attention: dict[tuple, tuple[str, Attention]] = {}

    def model(self, shape: ModelShape) -> None:
        shape = replace(shape, layers=self.args.layers or shape.layers)
        for kind in sorted(self.args.kinds, key=KINDS.index):
            for d in self._fractions(kind):
                if self._late():
                    print(f"{shape.name} {kind} {d}: left out, time is up", flush=True)
                else:
                    self._kind(shape, kind, d)

    def _fractions(self, kind: str) -> list[float | None]:
        if kind == "dense":
            return [None]
        return self.args.dense if kind == "spense" else self.args.rival_dense

    def _late(self) -> bool:
        limit = self.args.stop_after
        return limit is not None and time.perf_counter() - self.start > limit

    def _kind(self, shape: ModelShape, kind: str, d: float | None) -> None:
        rows = [*self.args.batch, *self.args.prefill]
        weights = None
        start = time.perf_counter()
        try:
            make = factory(kind, d, self.device, rows, self.recorder)
            weights = Weights(shape, make, self.device)
            self._synchronize()
            name = kind if d is None else f"{kind} {d:.1%}"
            seconds = time.perf_counter() - start
            print(f"{shape.name} {name}: weights made in {seconds:.1f} s", flush=True)
            self.clocks = clocks(self.device)
            for length in self.args.prefill:
                self._time(weights, kind, d, "prefill", 1, length, "bf16")
            for context in self.args.context:
                for cache in self.args.cache:
                    for batch in self.args.batch:
                        self._time(weights, kind, d, "decode", batch, context, cache)
        except torch.OutOfMemoryError:
            print(f"{shape.name} {kind}: its weights do not fit", flush=True)
        except RuntimeError as fault:
            self._failed(f"{shape.name} {kind}", fault)
        finally:
            del weights
            self._clear()

    def _time(
        self,
        weights: Weights,
        kind: str,
        d: float | None,
        what: str,
        batch: int,
        context: int,
        cache: str,
    ) -> None:
        where = (
            f"{weights.shape.name} {kind} {what} batch {batch}, context {context}, {cache} cache"
        )
        if self._late():
            print(f"{where}: left out, time is up", flush=True)
            return
        self._clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            free, _ = torch.cuda.mem_get_info(self.device)
            wanted = weights.shape.cache_bytes(batch, context, CACHES[cache].itemsize)
            if wanted + GIB > free:
                print(
                    f"{where}: does not fit: {wanted / GIB:.1f} of {free / GIB:.1f} GiB", flush=True
                )
                return
        try:
            point = self._measure(weights, what, batch, context, cache)
        except torch.OutOfMemoryError:
            print(f"{where}: does not fit", flush=True)
            return
        except RuntimeError as fault:
            self._failed(where, fault)
            return
        point |= {
            "model": weights.shape.name,
            "layers": weights.shape.layers,
            "kind": kind,
            "dense": d,
            "what": what,
            "batch": batch,
            "context": context,
            "cache": cache,
            "linear_gib": round(weights.linear_bytes / GIB, 3),
            "clocks": self.clocks,
        }
        print(line(self.results.add(point), self.results.points), flush=True)

    def _measure(self, weights: Weights, what: str, batch: int, context: int, cache: str) -> dict:
        shape, device = weights.shape, self.device
        prefill = what == "prefill"
        tokens = context if prefill else 1
        memory = Cache(shape, batch, context, CACHES[cache], device)
        key = (shape, what, batch, context, cache)
        positions = torch.arange(context - tokens, context, device=device)

        def step_with(attention: Attention, layers: int | None = None) -> Step:
            return Step(weights, memory, positions, attention, device.type == "cuda", layers)

        if key not in self.attention:
            size = (batch, tokens, shape.heads, shape.head_dim)
            q = torch.randn(size, dtype=torch.bfloat16, device=device).transpose(1, 2)
            self.attention[key] = fastest(
                *(self.recorder, q, memory.layers, prefill),
                lambda attention: step_with(attention, FEW_LAYERS).run,
            )
        name, attention = self.attention[key]
        step = step_with(attention)
        last = inputs_of(step, [shape.layers - 1])
        recordings = {"whole": self.recorder.record([step.run], 1)}
        if not self.args.no_parts:
            for part in PARTS:
                recordings[part] = self.recorder.record([partial(step.run, (part,))], 1)
        cuda = device.type == "cuda"
        seconds = self.args.seconds * (2 if len(recordings) > 1 else 1) if cuda else 0
        if prefill:
            times = self.recorder.measure_settled(recordings)
        else:
            times = self.recorder.measure(recordings, seconds)
        ms = times["whole"]["us"] / 1e3
        adds = self._timeline(step, recordings["whole"]) if self.args.timeline else {}
        return {
            **adds,
            "ms": round(ms, 4),
            "spread": times["whole"]["spread"],
            "tokens_per_s": round(batch * tokens / ms * 1e3, 1),
            "parts_ms": {p: round(times[p]["us"] / 1e3, 4) for p in PARTS if p in times},
            "attention": name,
            "last_layer_x8": {x.name: asdict(x) for x in last},
            "peak_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 2) if cuda else 0.0,
        }

    def _timeline(self, step: Step, whole: Recording) -> dict:
        """Prints both views of decoding.timeline; {"adds_us": ...} of the first."""
        adds = timeline.marginal(self.recorder, step, self.args.seconds * 2)
        print("  us a layer:", ", ".join(f"{name} {us}" for name, us in adds.items()), flush=True)
        if self.device.type == "cuda":
            try:
                found = timeline.places(timeline.trace(whole.replay))
                print("\n".join(timeline.table(found)), flush=True)
            except (RuntimeError, ValueError) as fault:  # profilers are not allowed everywhere
                print(f"  no trace: {fault}", flush=True)
        return {"adds_us": adds}

    def _failed(self, where: str, fault: RuntimeError) -> None:
        """The others are timed all the same; the exit code tells."""
        self.failures += 1
        print(f"{where}: FAILED: {str(fault).strip().splitlines()[0]}", flush=True)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.merge_only:
        Results(args.out, {}, args.merge).write()
        return 0
    torch.manual_seed(0)
    runner = Runner(args)
    print(HEADER, flush=True)
    with torch.inference_mode():
        for name in args.models:
            runner.model(MODELS[name])
    runner.results.write()
    return 1 if runner.failures else 0


if __name__ == "__main__":
    sys.exit(main())
