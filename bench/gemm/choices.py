# SPDX-License-Identifier: Apache-2.0
"""Times the op's own choice of a configuration beside every other that it could have taken."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import torch

from gemm import ceiling, cost_model
from gemm.regret import AUTO, regret_of
from gemm.rivals import Spense
from gemm.shapes import HUNGRY_TOKENS
from gemm.timing import Call, Recorder, Recording, rotation

# A recording lasts at least about so long: what its first launch waits for is no part of a model's
# many layers, and differs by configuration.
GRAPH_US = 2400
MAX_LAUNCHES = 256  # of a recording
MOST_TOKEN_TILES, FAR_BEHIND = 16, 1.5  # of a configuration that may be the fastest
TRIES = 2  # launches that may show it, each with a cold L2
ROUNDS, DOUBT_ROUNDS = 5, 15
CLOSE = 1.2  # the same from HUNGRY_TOKENS on, where each has the device to itself for long
ALONE = "alone"
DOUBT, DOUBTED = 0.03, 3  # regret above which the fastest few are timed again


def token_tile(name: str) -> int | None:
    """128 of t128x128_c1_s5x6_f:whole; None for a name of another kind."""
    match = re.match(r"t\d+x(\d+)_", name)
    return int(match[1]) if match else None


def launches(recorder: Recorder, floor_us: float, us: float) -> int:
    """Launches that take about `us`; one where only the logic is tried."""
    if recorder.device.type == "cpu":
        return 1
    return min(max(1, round(us / floor_us)), MAX_LAUNCHES)


def near_of(us: dict[str, float], far: float, always: Sequence[str]) -> set[str]:
    """Names that take less than `far` times the least, and those that are kept in any case."""
    least = min(us.values())
    return {name for name, time in us.items() if name in always or time < far * least}


class Choices:
    """Times one problem after another under all of `names`, none of which has to be legal."""

    def __init__(self, recorder: Recorder, names: Sequence[str], bytes_per_second: float):
        self.recorder, self.names, self.rate = recorder, names, bytes_per_second
        self._refused: set[str] = set()  # said once
        self._model, self._multiprocessors = cost_model.Model.read(), cost_model.MULTIPROCESSORS
        if recorder.device.type == "cuda":
            properties = torch.cuda.get_device_properties(recorder.device)
            self._multiprocessors = properties.multi_processor_count

    def measure(self, spense: Spense, m: int, model: Sequence[Spense] = ()) -> dict[str, dict]:
        """Summaries (timing.Recorder.measure) by configuration, "auto" among them.

        With the layers of a `model` in their order, the layer's time is what it adds to theirs: it
        is launched between them, each as the op chooses, where it may overlap with other
        neighbours than itself. "auto" is the layer alone, the others differ from it as passes do.

        Configurations that first launches show to be far behind are left out, but for the one that
        the cost model chooses: what a choice loses is told from its forced run. Where the choice
        seems to lose much, both and the fastest others are recorded and timed once more, longer:
        the least of many times that vary is too good, and where results lie matters too.
        """
        chosen = self._chosen(spense, m)
        contenders = self._contenders(spense, m, chosen)
        times = self._times(spense, m, contenders, ROUNDS, model)
        if regret_of(times) > DOUBT:
            forced = sorted((t["us"], name) for name, t in times.items() if name != AUTO)
            again = {AUTO, chosen, *(name for _, name in forced[:DOUBTED])}
            close = {name: calls for name, calls in contenders.items() if name in again}
            times |= self._times(spense, m, close, DOUBT_ROUNDS, model)
        if chosen in times:
            times[AUTO]["choice"] = chosen
        return times

    def _times(
        self,
        spense: Spense,
        m: int,
        contenders: dict[str, list[Call]],
        rounds: int,
        model: Sequence[Spense],
    ) -> dict[str, dict]:
        def turns(of: Sequence[Spense]) -> int:
            floor = sum(ceiling.floor_us(s.layer, s.split, m, self.rate) for s in of)
            return launches(self.recorder, floor, GRAPH_US)

        def alone(calls: list[Call]) -> Recording:
            turn = rotation(calls, turns([spense]))
            return self.recorder.record(turn, len(turn))

        others = {other: other.calls(m) for other in model if other is not spense}
        passes = turns(model) if model else 0

        def among_others(calls: list[Call]) -> Recording:
            of = others | {spense: calls}
            turn = [of[s][i % len(of[s])] for i in range(passes) for s in model]
            return self.recorder.record(turn, passes)

        record = among_others if model else alone
        recordings = {name: record(calls) for name, calls in contenders.items()}
        if model:
            recordings[ALONE] = alone(contenders[AUTO])
        if m >= HUNGRY_TOKENS:
            times = self.recorder.measure_settled(recordings)
        else:
            times = self.recorder.measure(recordings, seconds=0, min_rounds=rounds)
        if model:
            beside = times[AUTO]["us"] - times.pop(ALONE)["us"]
            for summary in times.values():
                summary["us"] = round(summary["us"] - beside, 3)
        return times

    def _contenders(self, spense: Spense, m: int, chosen: str) -> dict[str, list[Call]]:
        """The op's choice, `chosen`, and each other that runs here and is not far behind."""
        found = {AUTO: spense.calls(m)}
        first = found[AUTO][0]
        first()
        for name in self.names:
            if name != chosen and m > MOST_TOKEN_TILES * (token_tile(name) or m):
                continue
            calls = [partial(call, config=name) for call in found[AUTO]]
            try:
                calls[0]()
            except RuntimeError as problem:
                if name not in self._refused:
                    print(f"{spense.layer.label}, M = {m}: not {name}: {problem!s:.200}")
                self._refused.add(name)
                continue
            found[name] = calls
        if self.recorder.device.type == "cpu":
            return found
        # Each launch on another copy, so that none finds the weight in L2.
        turns = [[calls[i % len(calls)]] for i, calls in enumerate([*found.values()] * TRIES)]
        times = self.recorder.quick(turns, one_wait=True)
        us = {name: min(times[i :: len(found)]) for i, name in enumerate(found)}
        near = near_of(us, CLOSE if m >= HUNGRY_TOKENS else FAR_BEHIND, (AUTO, chosen))
        return {name: calls for name, calls in found.items() if name in near}

    def _chosen(self, spense: Spense, m: int) -> str:
        """The cost model's choice, by which tables judge a file; on a CPU none of `names`."""
        layer, packed = spense.layer, spense.split.packed_bytes
        return cost_model.choice(self._model, layer.n, layer.k, m, packed, self._multiprocessors)
