# SPDX-License-Identifier: Apache-2.0
"""When a library's kernel leaves the GPU unusable for the process: start anew without it.

An illegal access inside a library cannot be caught: every later call of the process fails too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import NoReturn

import torch

MOST_LOSSES = 3  # of one shape, before none of its algorithms is tried any more


class DeviceLost(Exception):
    """The GPU takes no more calls of this process.

    `causes`: what may have done it, as "NxK:ALGORITHM" or "NxK" of cuSPARSELt's operand.
    """

    def __init__(self, causes: Iterable[str]):
        self.causes = sorted(set(causes))
        super().__init__(f"the GPU takes no more calls after cuSPARSELt's {self.causes}")


def usable(device: torch.device) -> bool:
    """Waits for what runs; whether the device still takes calls then."""
    if device.type == "cpu":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def avoided(before: Iterable[str], causes: Iterable[str]) -> list[str]:
    """What to leave out from now on: `before`, the causes, and shapes that fail again and again."""
    found = dict.fromkeys([*before, *causes])
    for shape in {cause.partition(":")[0] for cause in found}:
        if sum(cause.startswith(f"{shape}:") for cause in found) >= MOST_LOSSES:
            found[shape] = None
    return list(found)


def start_anew(arguments: list[str]) -> NoReturn:
    """This program once more in its own place, with other arguments and a fresh GPU context."""
    sys.stdout.flush()
    sys.stderr.flush()
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                continue  # the listing's own
    os.execv(sys.executable, [sys.executable, sys.argv[0], *arguments])
