# SPDX-License-Identifier: Apache-2.0
"""Step times and memory peaks of the demo."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import contextmanager


def peak_rss_bytes() -> int:
    """The largest resident set this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_rss_bytes() -> int:
    """The resident set of now, or the peak where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_rss_bytes()


class Steps:
    """Prints numbered steps to stderr and keeps their times.

    Attributes:
        seconds: step name -> wall-clock seconds, in the order of the steps.
        children_peak: largest sum of our resident set and a child's peak seen so far, bytes.
    """

    def __init__(self, total: int):
        self.total = total
        self.seconds: dict[str, float] = {}
        self.children_peak = 0
        self._start = time.monotonic()

    @contextmanager
    def step(self, name: str):
        say(f"[{len(self.seconds) + 1}/{self.total}] {name}")
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin
        peak = max(peak_rss_bytes(), self.children_peak) / 1e9
        say(f"      {self.seconds[name]:.1f} s, peak memory so far {peak:.2f} GB")

    def child(self, peak_bytes: int, own_bytes: int) -> None:
        """Record a finished child's peak beside what this process held while it ran."""
        self.children_peak = max(self.children_peak, peak_bytes + own_bytes)

    @property
    def total_seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def peak_bytes(self) -> int:
        """Upper bound of what all processes together held at one time."""
        return max(peak_rss_bytes(), self.children_peak)


def say(text: str = "") -> None:
    print(text, file=sys.stderr, flush=True)
