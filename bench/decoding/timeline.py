# SPDX-License-Identifier: Apache-2.0
"""Where the time of a decoding step goes, kernel by kernel.

Two views that check each other: what a kernel *adds* to the step (the whole step against the step
without it), and a trace of one decoder layer, whose kernels may overlap.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from gemm.timing import Recorder

from decoding.step import IN_A_LAYER, Step

REPLAYS = 4
ANCHOR = "_heads_kernel"  # of decoding.kernels, once a decoder layer


@dataclass(frozen=True)
class Span:
    """A kernel's name and when it ran, in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Place:
    """A kernel of the middle layers: microseconds, medians.

    us: from its first CTA to its last; gap: idle time before it, negative where it starts beside
    the kernel ahead; advance: from the end of all before it to its own, these add up to the layer.
    """

    name: str
    us: float
    gap: float
    advance: float


def marginal(
    recorder: Recorder, step: Step, seconds: float, names: Iterable[str] = IN_A_LAYER
) -> dict[str, float]:
    """Microseconds a layer that each kernel (or group of its call) adds to the whole step."""
    step.run()
    recordings = {"whole": recorder.record([step.run], 1)}
    for name in names:
        recordings[name] = recorder.record([partial(step.run, without=(name,))], 1)
    times = {name: time["us"] for name, time in recorder.measure(recordings, seconds).items()}
    whole = times.pop("whole")
    layers = step.weights.shape.layers
    return {name: round((whole - us) / layers, 2) for name, us in times.items()}


def trace(replay: Callable[[], None]) -> list[Span]:
    """Kernels and copies of some replays on the GPU, in the order of their start."""
    from torch.profiler import ProfilerActivity, profile

    replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
    spans = [
        Span(e.name(), e.start_ns() / 1e3, (e.start_ns() + e.duration_ns()) / 1e3)
        for e in profiler.profiler.kineto_results.events()
        if e.device_type() == torch.autograd.DeviceType.CUDA and e.duration_ns() > 0
    ]
    return sorted(spans, key=lambda span: span.start)


def places(spans: list[Span], anchor: str = ANCHOR) -> list[Place]:
    """The kernels of a decoder layer in order, from one `anchor` to before the next.

    Layers with other kernels than most (the last of a step, before the head) do not count.
    """
    marks = [i for i, span in enumerate(spans) if anchor in span.name]
    layers = [range(a, b) for a, b in pairwise(marks)]
    if not layers:
        raise ValueError(f"no two kernels named {anchor} among {len(spans)}")
    usual = statistics.mode(tuple(spans[i].name for i in layer) for layer in layers)
    layers = [layer for layer in layers if tuple(spans[i].name for i in layer) == usual]
    ends = [float("-inf")]  # of all kernels before
    for span in spans:
        ends.append(max(ends[-1], span.end))
    found = []
    for place, name in enumerate(usual):
        at = [layer[place] for layer in layers if layer[0] > 0]
        of = [(spans[i].end - spans[i].start, spans[i].start - ends[i]) for i in at]
        advance = [ends[i + 1] - ends[i] for i in at]
        us, gap = (statistics.median(values) for values in zip(*of, strict=True))
        found.append(Place(name, us, gap, statistics.median(advance)))
    return found


def short(name: str) -> str:
    """A kernel's name without namespaces' and templates' tails."""
    for word in ("void ", "(anonymous namespace)::", "spense::", "at::native::", "cutlass::"):
        name = name.replace(word, "")
    return name[:56]


def table(found: list[Place]) -> list[str]:
    lines = [f"  {'us':>7} {'gap':>7} {'advance':>8}  kernel"]
    lines += [f"  {p.us:>7.2f} {p.gap:>7.2f} {p.advance:>8.2f}  {short(p.name)}" for p in found]
    total = sum(p.advance for p in found)
    return [*lines, f"  {'':>7} {'':>7} {total:>8.2f}  a decoder layer"]
