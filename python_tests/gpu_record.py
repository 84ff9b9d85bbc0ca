# SPDX-License-Identifier: Apache-2.0
"""Writes the record of a run of the GPU tests: outcomes by file, device, versions and commit.

    SPENSE_TEST_LOG=tests.jsonl python -m pytest -m gpu python_tests
    python python_tests/gpu_record.py tests.jsonl --commit HASH --device NAME --torch VERSION \
        --sanitizers sanitizers.json --out bench/results/gpu_tests.json

A test that ran several times counts with its last outcome. `sanitizers` is a file of findings by
tool, written by whoever looked up what bench/sanitize.py reports; without it the record says
nothing of them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

OUTCOMES = ("passed", "failed", "skipped")


def outcomes_by_file(lines: list[str]) -> dict[str, dict]:
    """{file: counts of OUTCOMES, and messages of failures by test}."""
    last = {entry["test"]: entry for entry in map(json.loads, lines)}
    files: dict[str, Counter] = {}
    failures: dict[str, dict[str, str]] = {}
    for test, entry in last.items():
        name = test.partition("::")[0]
        files.setdefault(name, Counter())[entry["outcome"]] += 1
        if entry["outcome"] == "failed":
            failures.setdefault(name, {})[test] = entry.get("message", "")
    return {
        name: {outcome: counts[outcome] for outcome in OUTCOMES}
        | ({"failures": failures[name]} if name in failures else {})
        for name, counts in sorted(files.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", nargs="+", type=Path, help="files that SPENSE_TEST_LOG named")
    parser.add_argument("--commit", required=True, help="of the tree that was tested")
    parser.add_argument("--device", required=True, help="the GPU's name")
    parser.add_argument("--torch", required=True, help="its version there")
    parser.add_argument("--sanitizers", type=Path, help="findings by tool, JSON")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu_tests.json"))
    args = parser.parse_args()
    files = outcomes_by_file([line for log in args.logs for line in log.read_text().splitlines()])
    record = {
        "device": args.device,
        "torch": args.torch,
        "commit": args.commit,
        "date": datetime.now(UTC).date().isoformat(),
        "total": {name: sum(counts[name] for counts in files.values()) for name in OUTCOMES},
        "files": files,
    }
    if args.sanitizers:
        record["sanitizers"] = json.loads(args.sanitizers.read_text())
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(record["total"])


if __name__ == "__main__":
    main()
