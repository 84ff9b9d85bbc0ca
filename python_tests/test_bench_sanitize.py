# SPDX-License-Identifier: Apache-2.0
"""bench/sanitize.py: its work on the CPU, a program in the tool's place, what tools report."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
KERNEL = "_ZN6spense4sm9011hybrid_gemmINS0_6TraitsI{}EEEEvNS0_6ParamsE"
NUMBERS = {
    "t128x16_c1_s8x13": "Li1ELi16ELi1ELi8ELi13ELi2ELb1E",
    "t128x32_c1_s7x9": "Li1ELi32ELi1ELi7ELi9ELi2ELb1E",
}


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def sanitize(monkeypatch, tmp_path, capsys):
    """Runs the script with a tool that runs the work, then says what `says` holds."""

    def of(*arguments: object, says: str = "") -> tuple[str, dict, str]:
        program = tmp_path / "compute-sanitizer"
        (tmp_path / "says").write_text(says)
        program.write_text(
            '#!/bin/sh\n[ "$1" = --help ] && { echo "--show-backtrace ARG"; exit; }\n'
            'while [ "${1#--}" != "$1" ]; do shift 2; done\n"$@" || exit 1\n'
            f"cat {tmp_path / 'says'}\n[ ! -s {tmp_path / 'says'} ] || exit 9\n"
            'echo "========= ERROR SUMMARY: 0 errors"\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setenv("PYTHONPATH", str(BENCH.parent))
        file = tmp_path / "sanitize.json"
        monkeypatch.setattr(sys, "argv", ["sanitize", "--json", str(file), *map(str, arguments)])
        importlib.import_module("sanitize").main()
        return capsys.readouterr().out, json.loads(file.read_text()), tmp_path / "sanitize.log"

    return of


@pytest.mark.parametrize(("configs", "clean"), [("portable", True), ("no_such", False)])
def test_a_tool_is_clean_when_every_job_was_right(sanitize, configs, clean):
    words = ("--device", "cpu", "--tools", "memcheck", "--configs", configs)
    text, results, log = sanitize(*words)
    found = results["memcheck"]
    assert found["clean"] is clean
    assert found["jobs"] == 5
    assert len(found["right"]) == 5 - len(found["wrong"])
    assert ("portable" in found["right"]) is clean
    assert ("memcheck: clean" in text) is clean
    assert found["summary"] == (["ERROR SUMMARY: 0 errors"] if clean else [])
    assert "  all done" in log.read_text()


def test_a_tool_that_does_not_end_is_stopped(sanitize):
    words = ("--device", "cpu", "--tools", "initcheck", "--configs", "portable")
    _, results, log = sanitize(*words, "--limit-s", "0")
    assert results["initcheck"]["exit"] == "timeout"
    assert not results["initcheck"]["clean"]
    assert "initcheck exit timeout" in log.read_text()


def race(config: str, write: int, read: int, hazards: int) -> str:
    kernel = KERNEL.format(NUMBERS[config])
    return (
        f"========= Error: Race reported between Write access at {kernel}+{write:#x}\n"
        f"=========     and Read access at {kernel}+{read:#x} [{hazards} hazards]\n"
        "========= \n"
    )


UNINITIALISED = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void spense::sm90::hybrid_gemm<spense::sm90::Traits<(int)1, (int)16, \
(int)1, (int)8, (int)13, (int)2, (bool)1>>(spense::sm90::Params)+0x40
=========     by thread ({thread},0,0) in block (0,0,0)
=========     Address {address} is out of nothing
========= """.replace("\\\n", "")


def reports() -> str:
    same = [UNINITIALISED.format(thread=i, address=hex(4096 + i)) for i in range(3)]
    return "\n".join(
        [
            "========= COMPUTE-SANITIZER",
            "  control: right, 0.1 s",
            race("t128x16_c1_s8x13", 0x190, 0x2A0, 4)
            + race("t128x16_c1_s8x13", 0x190, 0x2A0, 8)
            + race("t128x32_c1_s7x9", 0x190, 0x2A0, 4).rstrip(),
            *same,
            "========= RACECHECK SUMMARY: 16 hazards displayed (16 errors, 0 warnings)",
            "========= ERROR SUMMARY: 6 errors",
            "",
        ]
    )


def test_findings_that_are_alike_are_one():
    from sanitizing import findings

    found = findings.parse(reports())
    assert [f.count for f in found] == [3, 2, 1]
    assert [f.configs for f in found] == [
        {"t128x16_c1_s8x13"},
        {"t128x16_c1_s8x13"},
        {"t128x32_c1_s7x9"},
    ]
    assert [offset for _, offset in found[1].places] == [0x190, 0x2A0]
    assert found[0].text[0].startswith("Uninitialized")
    assert [offset for _, offset in found[0].places] == [0x40]


def test_what_a_tool_says_is_kept_and_read_again(sanitize, monkeypatch, tmp_path):
    words = ("--device", "cpu", "--tools", "racecheck", "--configs", "portable")
    text, results, log = sanitize(*words, says=reports())
    found = results["racecheck"]
    assert not found["clean"]
    assert found["exit"] == 9
    assert [entry["count"] for entry in found["findings"]] == [3, 2, 1]
    assert "2 x t128x16_c1_s8x13: Error: Race reported between Write access" in text

    lister = tmp_path / "cuobjdump"
    kernel = KERNEL.format(NUMBERS["t128x16_c1_s8x13"])
    lines = [f"Function : {kernel}", "  /*0190*/   UBLKCP.S.G [UR6], [UR4] ;  /* 0x1 */"]
    lister.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    lister.chmod(0o755)
    _, again, _ = sanitize("--read", log, "--cuobjdump", lister)
    assert again["racecheck"]["findings"][1]["code"] == ["UBLKCP.S.G [UR6], [UR4]", "?"]
    without = [entry | {"code": []} for entry in again["racecheck"]["findings"]]
    assert without == found["findings"]


@pytest.mark.parametrize(
    ("read", "control", "explained"),
    [
        ("LDS.128 R4, [R2]", True, True),
        ("@P0 LDS R4, [R2]", True, True),
        ("STS R4, [R2]", True, False),
        ("LDS.128 R4, [R2]", False, False),
    ],
)
def test_a_bulk_copy_is_explained_where_the_control_is_reported_too(read, control, explained):
    from sanitizing import findings

    text = race("t128x16_c1_s8x13", 0x190, 0x2A0, 4)
    if control:
        text += text.replace(KERNEL.format(NUMBERS["t128x16_c1_s8x13"]), findings.CONTROL)
    code = {0x190: "@!UP1 UBLKCP.S.G [UR6], [UR4], UR10", 0x2A0: read}
    entries = [finding.facts() for finding in findings.parse(text)]
    assert len(entries) == 1 + control
    findings.explain(entries, lambda kernel, at: code[at] if "hybrid" in kernel else "?")
    assert ["explained" in entry for entry in entries] == [explained, True][: len(entries)]
