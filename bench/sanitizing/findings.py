# SPDX-License-Identifier: Apache-2.0
"""What compute-sanitizer reported: findings that are alike counted as one, with their code.

A kernel is known by its name in the binary or by its readable one, whichever the tool prints.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field

from gemm.kernels import config_of

from spense_kernels._load import LIBRARY_FOLDER

MARK = "========="
CONTROL = "racecheck_control"  # the kernel of control.cu
TITLE = re.compile(r"(Error|Warning|Info|Invalid|Uninitialized|Barrier|Program|Fatal)\b|.*hazard")
NOT_TITLES = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY")
PLACE = re.compile(r"\bat (\S.*?)\+0x([0-9a-f]+)")
OFFSET = re.compile(r"\bat 0x([0-9a-f]+) in (\S.*)")  # as older tools write it
MOST_TEXTS = 40  # lines of one finding that are kept


# The one kind of report that says nothing: racecheck makes it of a pipeline that is right, so it
# cannot tell a wrong one there. What speaks for ours are the bitwise tests and synccheck.
BULK_COPY = (
    "racecheck takes a bulk copy (UBLKCP) for a write of the thread that issued it and does not "
    "see that a barrier in shared memory orders the reads (LDS): it reports control.cu too, which "
    "does this and nothing else"
)


@dataclass
class Finding:
    """One kind of report: where it is, how often it came, the text of the first."""

    text: list[str]
    places: list[tuple[str, int]]  # (kernel, byte in its code)
    count: int = 1
    configs: set[str] = field(default_factory=set)
    code: list[str] = field(default_factory=list)  # instruction of each place

    def facts(self) -> dict:
        places = [f"{kernel}+{offset:#x}" for kernel, offset in self.places]
        found = {"count": self.count, "configs": sorted(self.configs), "places": places}
        return found | {"code": self.code, "text": self.text[:MOST_TEXTS]}


def blocks(output: str) -> list[list[str]]:
    """The tool's lines, cut into reports; what the watched program prints is left out."""
    found: list[list[str]] = []
    open_block = False
    for line in output.splitlines():
        if not line.startswith(MARK):
            continue
        text = line[len(MARK) :].rstrip()
        if not text.strip():
            open_block = False
        elif not text.startswith("  "):  # a title; what belongs to it is set in
            open_block = bool(TITLE.match(text.strip())) and not text.strip().startswith(NOT_TITLES)
            if open_block:
                found.append([text.strip()])
        elif open_block:
            found[-1].append(text.strip())
    return found


def _key(lines: list[str]) -> str:
    """The report without what differs from thread to thread and run to run."""
    text = "\n".join(line for line in lines if "Host Frame" not in line)
    text = re.sub(r"\(\d+,\s*\d+,\s*\d+\)", "(thread)", text)
    text = re.sub(r"\[\d+ hazards?\]|Current Value : .*|Incoming Value : .*", "", text)
    return re.sub(r"(?<![+\w])(?<!at )0x[0-9a-f]+|\b\d+ bytes (?:after|before|inside)", "", text)


def parse(output: str) -> list[Finding]:
    """All findings of a tool's output, the most frequent first."""
    found: dict[str, Finding] = {}
    for lines in blocks(output):
        key, text = _key(lines), "\n".join(lines)
        if key in found:
            found[key].count += 1
            continue
        places = [(name, int(offset, 16)) for name, offset in PLACE.findall(text)]
        places += [(name, int(offset, 16)) for offset, name in OFFSET.findall(text)]
        found[key] = Finding(lines, places, configs={config_of(name) for name, _ in places})
    return sorted(found.values(), key=lambda f: -f.count)


def explain(entries: list[dict], instruction: Callable[[str, int], str]) -> None:
    """Adds to each entry (Finding.facts) its instructions, and the reason where it is BULK_COPY.

    That it is only where the tool reports the control kernel in the same run.
    """
    control = any(CONTROL in place for entry in entries for place in entry["places"])
    for entry in entries:
        places = [place.rpartition("+") for place in entry["places"]]
        entry["code"] = [instruction(kernel, int(at, 16)) for kernel, _, at in places]
        names = {re.sub(r"^@!?U?P\d+ ", "", code).partition(".")[0] for code in entry["code"]}
        names = {name.partition(" ")[0] for name in names}
        of_control = all(CONTROL in place for place in entry["places"])
        if entry["places"] and control and (of_control or names == {"UBLKCP", "LDS"}):
            entry["explained"] = BULK_COPY


def instructions(cuobjdump: str) -> Callable[[str, int], str]:
    """A look-up (kernel, byte in its code) -> instruction in the CUDA library of this build.

    Raises:
        subprocess.CalledProcessError: cuobjdump cannot read the library.
    """
    listing = subprocess.run(
        [cuobjdump, "-sass", str(LIBRARY_FOLDER / "libspense_cuda.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    code: dict[str, dict[int, str]] = {}
    here: dict[int, str] = {}
    for line in listing.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            here = code.setdefault(config_of(match[1]), {})
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            here[int(match[1], 16)] = match[2].strip()
    return lambda kernel, offset: code.get(config_of(kernel), {}).get(offset, "?")
