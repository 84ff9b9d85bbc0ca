# SPDX-License-Identifier: Apache-2.0
"""Which configuration a kernel is that a profiler or sanitizer names."""

from __future__ import annotations

import re
from pathlib import Path

INSTANCES = Path(__file__).resolve().parents[2] / "csrc" / "heuristics" / "sm90_instances.def"


def instances() -> dict[str, list[int]]:
    """Numbers of every compiled configuration, in the order of GemmConfig, by name."""
    rows = re.findall(r"^INSTANCE\((\w+),([^)]*)\)", INSTANCES.read_text(), re.MULTILINE)
    return {name: _numbers(row) for name, row in rows}


def config_of(kernel: str) -> str:
    """Name of the configuration that a kernel of the SM90 family is, or the name as it stands."""
    mangled = re.search(r"Traits(I(?:L[ib]\d+E)+)", kernel)
    readable = re.search(r"Traits<([^<>]*)>", kernel)
    if mangled:
        values = [int(v) for v in re.findall(r"L[ib](\d+)E", mangled[1])]
    elif readable:
        values = _numbers(re.sub(r"\(\w+\)", "", readable[1]))
    else:
        return kernel
    named = [name for name, numbers in instances().items() if numbers == values]
    return named[0] if named else kernel


def _numbers(words: str) -> list[int]:
    known = {"true": 1, "false": 0}
    return [known[w] if w in known else int(w) for w in re.split(r"[,\s]+", words.strip())]
