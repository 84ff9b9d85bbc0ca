# SPDX-License-Identifier: Apache-2.0
"""What a reader needs to place GPU figures: device, driver, clocks, versions, commit."""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from pathlib import Path

import torch

from spense_kernels import __version__, env

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    described = _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return described or "unknown"


def add_commit(parser: argparse.ArgumentParser) -> None:
    """The option whose value `machine` takes as `built`."""
    parser.add_argument("--commit", help="what was built, where git cannot tell")


def short_name(name: str, device: torch.device) -> str:
    """h100 of NVIDIA H100 80GB HBM3."""
    if device.type == "cpu":
        return "cpu"
    return next((word for word in name.lower().split() if word[-1].isdigit()), "gpu")


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature at this moment, as nvidia-smi words them."""
    if device.type == "cpu":
        return {}
    index = torch.cuda.current_device() if device.index is None else device.index
    query = ["nvidia-smi", f"--id={index}", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    values = _output(*query).split(", ")
    return dict(zip(CLOCKS.split(","), values, strict=True)) if len(values) > 1 else {}


def machine(device: torch.device, built: str | None = None) -> dict:
    """All facts of a run; `built` names the commit where there is no git checkout."""
    facts = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": built or commit(),
        "versions": {
            "spense_kernels": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cusparselt": torch.backends.cusparselt.version(),
            "python": platform.python_version(),
        },
        "clocks": clocks(device),
    }
    if device.type == "cpu":
        return facts | {"device": {"name": env.cpu_name()}}
    found = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return facts | {
        "device": {
            "name": found.name,
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
            "memory_bytes": found.total_memory,
            "driver": (_output(*query).splitlines() or ["unknown"])[0],
        }
    }
