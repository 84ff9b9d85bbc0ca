# SPDX-License-Identifier: Apache-2.0
"""Reads mutations.txt: faults that are put into the kernels, one at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

DEFAULT_CONFIG = "t128x16_g1_s4x14_o2"


class Mutation(NamedTuple):
    name: str
    file: str  # below csrc
    config: str  # of SM100
    old: str  # occurs once
    new: str
    reason: str  # why it changes nothing that can be seen; empty for a fault


def read(path: Path) -> list[Mutation]:
    found = []
    for block in re.split(r"^== ", path.read_text(), flags=re.MULTILINE)[1:]:
        head, *lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        name, file, config = re.fullmatch(r"(.+): (\S+)(?: @ (\w+))?", head).groups()
        old, new, reason = (
            "\n".join(line[1:] for line in lines if line[0] == mark) for mark in "-+~"
        )
        found.append(Mutation(name, file, config or DEFAULT_CONFIG, old, new, reason))
    return found


ALL = read(Path(__file__).with_suffix(".txt"))
MUTATIONS = [m for m in ALL if not m.reason]
EQUIVALENT = [m for m in ALL if m.reason]
