# SPDX-License-Identifier: Apache-2.0
"""Runs compute-sanitizer's tools over every kernel and configuration on tiny problems.

    python bench/sanitize.py --json sanitize.json     # memcheck, racecheck, synccheck, initcheck
    python bench/sanitize.py --tools memcheck --configs t128x16_c1_s8x13
    python bench/sanitize.py --read sanitize.log --json sanitize.json           # without a GPU

The tools run beside one another, a process each, and a tool that has not ended after --limit-s is
stopped; what it has said until then counts. A tool is clean when it has found nothing, reached the
end, and every job's result was right. Next to the JSON lies a log with all that the tools printed.

Findings that differ in threads and addresses only are one, with their number. `--read` looks up
the instructions that they name in this build's library (cuobjdump), which has to be the one that
ran, and marks those that say nothing (`BULK_COPY` in sanitizing/findings.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gemm.nvcc import build, toolkit_program
from sanitizing import findings

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FIRST_PORT, PORTS = 49152, 200  # compute-sanitizer talks to what it watches; a range for each tool
GRACE_S = 4  # to sum up after an interrupt
MOST_LOG = 14 << 20  # bytes of a log that are kept
HEADING = "##### "  # of a tool in the log
CONTROL = Path(findings.__file__).with_name("control.cu")
RIGHT, WRONG = (re.compile(rf"^  (\S+): {word}(.*)", re.MULTILINE) for word in ("right", "WRONG"))


def sanitizer() -> list[str]:
    """The program, and the options among those we want that it knows."""
    found = toolkit_program("compute-sanitizer")
    known = subprocess.run([found, "--help"], capture_output=True, text=True).stdout
    options = [("--demangle", "no"), ("--show-backtrace", "no")]
    return [found, *(word for option in options if option[0] in known for word in option)]


def control_library(device: str) -> Path | None:
    """control.cu, built once for all tools; None where that is not possible."""
    if device == "cpu":
        return None
    try:
        return build(CONTROL, "90")
    except (RuntimeError, subprocess.CalledProcessError) as problem:
        print(f"no control: {problem}")
        return None


class Watch:
    """The work under one tool, in a process group of its own."""

    def __init__(self, tool: str, args: argparse.Namespace, folder: Path, control: Path | None):
        self.tool, self.start = tool, time.perf_counter()
        port = FIRST_PORT + PORTS * TOOLS.index(tool)
        command = [*sanitizer(), "--tool", tool, "--error-exitcode", "9", "--print-limit", "5000"]
        command += ["--port", str(port), "--launch-timeout", "60", *args.options.split()]
        command += [sys.executable, __file__, "--work"]
        command += ["--configs", args.configs, "--device", args.device]
        command += ["--control", str(control)] if control else []
        print(f"{tool}: {' '.join(command)}", flush=True)
        self.file = folder / f"{tool}.txt"
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with self.file.open("w") as out:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, limit_s: float) -> dict:
        """What the tool said; one that has not ended in time is interrupted, then killed."""
        code: int | str
        left = self.start + limit_s - time.perf_counter()
        try:
            code = self.process.wait(max(0.1, left))
        except subprocess.TimeoutExpired:
            code = "timeout"
            self._stop()
        facts = {"exit": code, "seconds": round(time.perf_counter() - self.start, 1)}
        return facts | read(self.output(), code)

    def output(self) -> str:
        return self.file.read_text(errors="replace")

    def _stop(self) -> None:
        for sign in (signal.SIGINT, signal.SIGKILL):
            os.killpg(self.process.pid, sign)
            try:
                self.process.wait(GRACE_S)
                return
            except subprocess.TimeoutExpired:
                continue


def read(text: str, code: int | str) -> dict:
    """What the output of one tool says."""
    found = findings.parse(text)
    wrong = [name + rest for name, rest in WRONG.findall(text)]
    jobs = re.search(r"^  jobs: (\d+)", text, re.MULTILINE)
    ended = "  all done" in text
    facts = {
        "clean": code == 0 and ended and not found and not wrong,
        "jobs": int(jobs[1]) if jobs else None,
        "right": [name for name, _ in RIGHT.findall(text)],
        "wrong": wrong,
        "summary": re.findall(r"={3,} (\w* ?SUMMARY: .*)", text),
        "findings": [f.facts() for f in found],
    }
    if not ended and code != "timeout":
        facts["last_lines"] = text.splitlines()[-20:]
    return facts


def report(tool: str, found: dict) -> str:
    verdict = "clean" if found["clean"] else f"NOT CLEAN (exit {found['exit']})"
    reasons = dict.fromkeys(e["explained"] for e in found["findings"] if "explained" in e)
    if reasons:
        explained = sum("explained" in entry for entry in found["findings"])
        verdict += f", {explained} of {len(found['findings'])} kinds of finding explained"
    lines = [
        f"{tool}: {verdict}, {len(found['right'])} of {found['jobs']} jobs right, "
        f"{found['seconds']} s {' '.join(found['summary'])}"
    ]
    lines += [f"  wrong: {text}" for text in found["wrong"]]
    for entry in found["findings"]:
        lines.append(f"  {entry['count']} x {', '.join(entry['configs'])}: {entry['text'][0]}")
        lines += [f"      {line}" for line in entry["text"][1:4]]
        lines += [f"      {p}: {c}" for p, c in zip(entry["places"], entry["code"], strict=False)]
    lines += [f"  explained: {reason}" for reason in reasons]
    return "\n".join([*lines, *found.get("last_lines", [])])


def write(path: Path | None, results: dict, texts: dict[str, str]) -> None:
    """The JSON and, beside it, the log."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    share = MOST_LOG // len(TOOLS)
    parts = [
        f"{HEADING}{tool} exit {results[tool]['exit']} after {results[tool]['seconds']} s\n"
        + (text if len(text) <= share else text[:share] + "\n(cut here)\n")
        for tool, text in texts.items()
    ]
    path.with_suffix(".log").write_text("".join(parts))


def read_log(log: Path, cuobjdump: str | None) -> dict:
    """The results anew from a log, with the instructions of every place."""
    instruction = findings.instructions(cuobjdump) if cuobjdump else None
    results = {}
    pattern = rf"^{HEADING}(\w+) exit (\S+) after (\S+) s$"
    _, *parts = re.split(pattern, log.read_text(), flags=re.MULTILINE)
    for tool, code, seconds, text in zip(*[iter(parts)] * 4, strict=True):
        exit_code = int(code) if code.lstrip("-").isdigit() else code
        results[tool] = {"exit": exit_code, "seconds": float(seconds)} | read(text, exit_code)
        if instruction:
            findings.explain(results[tool]["findings"], instruction)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--configs", default="all", help="all, or names with commas between")
    parser.add_argument("--options", default="", help="more options of compute-sanitizer")
    parser.add_argument("--limit-s", type=float, default=110, help="seconds of one tool")
    parser.add_argument("--one-by-one", action="store_true", help="a tool at a time")
    parser.add_argument("--json", type=Path, help="where results go; the log lies beside")
    parser.add_argument("--read", type=Path, help="a log: no run, its findings explained")
    parser.add_argument("--cuobjdump", default=shutil.which("cuobjdump"), help="for --read")
    parser.add_argument("--device", default="cuda", help="cpu tries the work itself")
    parser.add_argument("--control", type=Path, help="control.cu, built; for --work")
    parser.add_argument("--work", action="store_true", help="only the work, not watched")
    args = parser.parse_args()
    if args.work:
        from sanitizing.work import work

        return int(work(args.configs.split(","), args.device, args.control) > 0)
    if args.read:
        results = read_log(args.read, args.cuobjdump)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        print("\n".join(report(tool, found) for tool, found in results.items()))
        return int(not all(found["clean"] for found in results.values()))
    results, texts, tools = {}, {}, args.tools.split(",")
    control = control_library(args.device)
    with tempfile.TemporaryDirectory() as folder:
        for group in [[tool] for tool in tools] if args.one_by_one else [tools]:
            for watch in [Watch(tool, args, Path(folder), control) for tool in group]:
                found = results[watch.tool] = watch.finish(args.limit_s)
                texts[watch.tool] = watch.output()
                write(args.json, results, texts)
                print(report(watch.tool, found), flush=True)
    return int(not all(found["clean"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
