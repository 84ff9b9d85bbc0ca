# SPDX-License-Identifier: Apache-2.0
"""Times of launch sequences: one CUDA graph a rival, replayed in turn, medians over rounds.

On the CPU the same code runs the calls one after another, so that the logic can be tried there.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

Call = Callable[[], object]
MIN_ROUNDS, MAX_ROUNDS = 7, 41
LONG_ROUND_S, MIN_LONG_ROUNDS = 0.03, 3  # where a round lasts so long, few will do
BLOCK_S, BLOCKS = 0.08, 3  # of every recording, where each has the device to itself
QUICK_SLEEP_CYCLES = 2_000_000  # about a millisecond, for the host to get ahead in
LAUNCH_CYCLES = 200_000  # the same for each of many launches, ample


@dataclass(frozen=True)
class Recording:
    """Calls recorded once and replayed as a whole; `passes` of whatever is to be timed."""

    replay: Callable[[], None]
    passes: int


class Recorder:
    """Records calls on one device; its graphs share a memory pool and one stream."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.pool = torch.cuda.graph_pool_handle()
            # A pool lives as long as some graph uses it.
            self._anchor = self._graph([lambda: torch.zeros(1, device=device)])

    def record(self, calls: Sequence[Call], passes: int) -> Recording:
        """Runs each distinct call once, then records all of them. Their results are dropped."""
        for call in dict.fromkeys(calls):
            call()
        if self.device.type == "cpu":
            return Recording(lambda: _run(calls), passes)
        return Recording(self._graph(calls).replay, passes)

    def _graph(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        # Not torch.cuda.graph, which collects garbage and empties the cache each time.
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=self.pool)
                try:
                    _run(calls)
                finally:
                    graph.capture_end()
        except RuntimeError:
            self._start_anew()
            raise
        return graph

    def _start_anew(self) -> None:
        """After a recording that failed nothing may use its stream and pool any more."""
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()
        self._anchor = None

    def quick(self, choices: Sequence[Sequence[Call]], one_wait: bool = False) -> list[float]:
        """Rough microseconds of each of several ways to do the same, on a GPU, without a graph.

        Before each way the GPU waits for the host to get ahead; with `one_wait` before the first
        alone, which does for calls that are quick to launch.
        """
        times = []
        with torch.cuda.stream(self.stream):
            if one_wait:
                torch.cuda._sleep(QUICK_SLEEP_CYCLES + LAUNCH_CYCLES * sum(map(len, choices)))
            for calls in choices:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if not one_wait:
                    torch.cuda._sleep(QUICK_SLEEP_CYCLES)
                begin.record()
                _run(calls)
                end.record()
                times.append((begin, end))
        self.stream.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in times]

    def measure(
        self, recordings: dict[str, Recording], seconds: float, min_rounds: int = MIN_ROUNDS
    ) -> dict[str, dict]:
        """{"us": median microseconds a pass, "spread": quartile distance / median, "rounds"}.

        Every round replays every recording once, in a new order; the first does not count. Goes on
        for `seconds`, within `min_rounds` and MAX_ROUNDS; fewer rounds where one is long.
        """
        if self.device.type == "cpu":
            min_rounds = 2
        order = list(recordings)
        shuffle = random.Random(0).shuffle
        times: dict[str, list[float]] = {name: [] for name in order}
        start, rounds = time.perf_counter(), 0
        self._round(recordings, order)
        if time.perf_counter() - start > LONG_ROUND_S:
            min_rounds = min(min_rounds, MIN_LONG_ROUNDS)
        start = time.perf_counter()
        while rounds < min_rounds or (
            rounds < MAX_ROUNDS and time.perf_counter() - start < seconds
        ):
            shuffle(order)
            for name, us in self._round(recordings, order).items():
                times[name].append(us / recordings[name].passes)
            rounds += 1
        return {name: _summary(series) for name, series in times.items()}

    def measure_settled(self, recordings: dict[str, Recording]) -> dict[str, dict]:
        """As `measure`, but every recording is replayed for BLOCK_S at a stretch, in BLOCKS rounds;
        only the later half of a stretch counts. For work that makes a device lower its clock: it
        runs at the clock that it brings about itself, not at one that all recordings share.
        """
        if self.device.type == "cpu":
            return self.measure(recordings, seconds=0)
        order = list(recordings)
        shuffle = random.Random(0).shuffle
        first = self._round(recordings, order)
        replays = {name: max(4, round(BLOCK_S * 1e6 / us)) for name, us in first.items()}
        times: dict[str, list[float]] = {name: [] for name in order}
        for _ in range(BLOCKS):
            shuffle(order)
            for name in order:
                series = self._in_a_row(recordings[name], replays[name])
                times[name] += [us / recordings[name].passes for us in series[len(series) // 2 :]]
        return {name: _summary(series) for name, series in times.items()}

    def _in_a_row(self, recording: Recording, replays: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        with torch.cuda.stream(self.stream):
            events[0].record()
            for event in events[1:]:
                recording.replay()
                event.record()
        self.stream.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in pairwise(events)]

    def _round(self, recordings: dict[str, Recording], order: list[str]) -> dict[str, float]:
        if self.device.type == "cpu":
            return {name: _cpu_us(recordings[name].replay) for name in order}
        events = {}
        with torch.cuda.stream(self.stream):
            for name in order:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                recordings[name].replay()
                end.record()
                events[name] = begin, end
        self.stream.synchronize()
        return {name: begin.elapsed_time(end) * 1e3 for name, (begin, end) in events.items()}


def rotation(calls: Sequence[Call], launches: int) -> list[Call]:
    """At least `launches` calls, in whole turns over the copies."""
    return list(calls) * max(1, -(-launches // len(calls)))


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _cpu_us(replay: Callable[[], None]) -> float:
    start = time.perf_counter()
    replay()
    return (time.perf_counter() - start) * 1e6


def _summary(series: list[float]) -> dict:
    low, median, high = statistics.quantiles(series)
    return {
        "us": round(median, 3),
        "spread": round((high - low) / median, 4),
        "rounds": len(series),
    }
