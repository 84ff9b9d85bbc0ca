# SPDX-License-Identifier: Apache-2.0
"""Where the time of a prune goes: seconds by phase, each without the phases inside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_running: ContextVar[Clock | None] = ContextVar("spense_prune_clock", default=None)


class Clock:
    """Seconds by phase of what runs inside `with clock:`.

    The device is waited for only where a phase begins or ends.

    Attributes:
        seconds: by name.
    """

    def __init__(self, device):
        self.seconds: dict[str, float] = {}
        self._cuda = torch.device(device).type == "cuda"
        self._names: list[str] = []
        self._since = 0.0

    def __enter__(self) -> Clock:
        self._token = _running.set(self)
        return self

    def __exit__(self, *_):
        _running.reset(self._token)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge `name` instead of the phase around it."""
        self._charge()
        self._names.append(name)
        try:
            yield
        finally:
            self._charge()
            self._names.pop()

    def _charge(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        now = time.monotonic()
        if self._names:
            name = self._names[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Charge what runs inside to `name`, on the clock that runs; without one, only run it."""
    clock = _running.get()
    if clock is None:
        yield
    else:
        with clock.phase(name):
            yield
