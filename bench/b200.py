# SPDX-License-Identifier: Apache-2.0
"""Everything that a B200 can tell about the SM100 kernels, in one run.

    python bench/b200.py            # writes b200_report/, to be sent back

Builds for the device, runs all tests, compares every configuration bit by bit, times the layers
against the libraries and every configuration, then builds the kernels without the drain between
sparse and dense instructions (docs/sm100.md) and compares again. A step that fails does not stop
the others. About 30 minutes; needs nvcc >= 12.8 and a torch with CUDA in this Python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Step(NamedTuple):
    name: str
    command: list[str]
    variables: dict[str, str]  # of the environment


def steps(out: Path, archs: str) -> list[Step]:
    python = sys.executable
    build = [python, "setup.py", "build_ext", "--inplace"]
    tests = [python, "-m", "pytest"]
    exact = [*tests, "python_tests/test_gpu_exact.py"]
    sweep = [python, "bench/gemm_sweep.py"]
    here = {"SPENSE_CUDA_ARCHS": archs, "SPENSE_REQUIRE_CUDA": "1"}
    without = here | {"SPENSE_SM100_DRAIN": "0"}
    sanitize = [python, "bench/sanitize.py", "--limit-s", "1200"]
    sanitize += ["--json", str(out / "sanitize.json")]
    return [
        Step("device", ["nvidia-smi", "-q"], {}),
        Step("build", build, here),
        Step("env", [python, "-m", "spense_kernels.cli", "env"], {}),
        Step("tests", tests, here),
        Step("sanitize", sanitize, {}),
        Step("sweep", [*sweep, "--json", str(out / "sweep.json")], {}),
        Step("configs", [*sweep, "--configs", "all", "--json", str(out / "configs.json")], {}),
        Step("build_without_drain", build, without),
        Step("exact_without_drain", exact, without),
        Step("build_again", build, here),
    ]


def run(step: Step, out: Path) -> dict:
    """What became of a step; its output is in a file of its name."""
    start = time.perf_counter()
    with (out / f"{step.name}.txt").open("w") as log:
        log.write(f"$ {' '.join(step.command)}\n")
        log.flush()
        environment = os.environ | step.variables
        try:
            done = subprocess.run(
                step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        except OSError as problem:
            log.write(f"{problem}\n")
            done = None
    seconds = round(time.perf_counter() - start, 1)
    print(f"{step.name}: exit code {done}, {seconds} s", flush=True)
    return {"step": step.name, "command": step.command, "exit_code": done, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("b200_report"))
    parser.add_argument("--archs", default="100a", help="architectures to build")
    parser.add_argument("--list", action="store_true", help="print the steps and run none")
    args = parser.parse_args()
    out = args.out.resolve()
    planned = steps(out, args.archs)
    if args.list:
        for step in planned:
            words = [f"{k}={v}" for k, v in step.variables.items()] + step.command
            print(f"{step.name}: {' '.join(words)}")
        return 0
    if out.exists():
        raise SystemExit(f"b200: --out: expected a folder that does not exist, got {out}")
    out.mkdir(parents=True)
    results = [run(step, out) for step in planned]
    (out / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    failed = [r["step"] for r in results if r["exit_code"] != 0]
    print(f"wrote {out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
