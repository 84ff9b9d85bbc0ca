# SPDX-License-Identifier: Apache-2.0
"""Answers two questions of the build on stdout: which nvcc, and for which GPU architectures.

    find_cuda.py --nvcc    path of an nvcc >= 12.8, or nothing
    find_cuda.py --archs   architectures to build, "90a;100a", or nothing for a build without CUDA

SPENSE_NVCC        the nvcc to use
SPENSE_CUDA_ARCHS  "90a;100a", "none", or empty: the architectures of the GPUs present
SPENSE_REQUIRE_CUDA=1  a build without CUDA is an error

The reason for an empty answer goes to stderr; exit code 1 means that the request cannot be met.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

MINIMUM = (12, 8)
KNOWN_ARCHS = {"9.0": "90a", "10.0": "100a"}


class NotPossible(Exception):
    """What was asked for cannot be built here."""


def nvcc_version(path: str) -> tuple[int, int] | None:
    try:
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def candidates() -> list[str]:
    """Places of nvcc: PATH, the usual folder, NVIDIA's wheels in this Python."""
    places = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for key in ("purelib", "platlib"):
        wheels = Path(sysconfig.get_path(key)) / "nvidia"
        # From CUDA 13 on they share one folder; before, compiler and headers lay apart.
        places += [str(p) for p in sorted(wheels.glob("cu[1-9][0-9]/bin/nvcc"), reverse=True)]
    return [p for p in places if p and Path(p).is_file()]


def find_nvcc() -> tuple[str | None, str]:
    """(path, "") or (None, why not)."""
    asked = os.environ.get("SPENSE_NVCC")
    if asked:
        version = nvcc_version(asked)
        if version is None:
            raise NotPossible(f"SPENSE_NVCC: expected an nvcc that runs, got {asked!r}")
        if version < MINIMUM:
            raise NotPossible(f"SPENSE_NVCC: expected version >= 12.8, got {version} at {asked!r}")
        return asked, ""
    seen = []
    for place in candidates():
        version = nvcc_version(place)
        if version and version >= MINIMUM:
            return place, ""
        seen.append(f"{place} is {version}")
    return None, "no nvcc >= 12.8 found" + (f" ({'; '.join(seen)})" if seen else "")


def present_archs() -> list[str]:
    """Architectures of this machine's GPUs that kernels exist for."""
    smi = shutil.which("nvidia-smi")
    if not smi:
        return []
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    text = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return sorted({KNOWN_ARCHS[c.strip()] for c in text.split() if c.strip() in KNOWN_ARCHS})


def find_archs() -> tuple[list[str], str]:
    """(architectures, "") or ([], why none)."""
    required = os.environ.get("SPENSE_REQUIRE_CUDA") == "1"
    asked = os.environ.get("SPENSE_CUDA_ARCHS", "").strip()
    if asked == "none":
        if required:
            raise NotPossible("SPENSE_REQUIRE_CUDA=1 and SPENSE_CUDA_ARCHS=none contradict")
        return [], "SPENSE_CUDA_ARCHS=none"
    archs = [a for a in re.split(r"[;,\s]+", asked) if a]
    for arch in archs:
        if arch not in KNOWN_ARCHS.values():
            known = ", ".join(KNOWN_ARCHS.values())
            raise NotPossible(f"SPENSE_CUDA_ARCHS: expected a list of {known}; got {arch!r}")
    archs = list(dict.fromkeys(archs)) or present_archs()
    if not archs:
        if required:
            raise NotPossible(
                "SPENSE_REQUIRE_CUDA=1, but SPENSE_CUDA_ARCHS is empty and no GPU here"
            )
        return [], "no supported GPU here; set SPENSE_CUDA_ARCHS to build for one elsewhere"
    nvcc, reason = find_nvcc()
    if nvcc is None:
        if required or asked:
            raise NotPossible(f"CUDA is demanded, but {reason}")
        return [], reason
    return archs, ""


def main() -> int:
    try:
        if sys.argv[1:] == ["--nvcc"]:
            answer, reason = find_nvcc()
        elif sys.argv[1:] == ["--archs"]:
            archs, reason = find_archs()
            answer = ";".join(archs)
        else:
            raise NotPossible("usage: find_cuda.py --nvcc | --archs")
    except NotPossible as problem:
        print(problem, file=sys.stderr)
        return 1
    if reason:
        print(reason, file=sys.stderr)
    print(answer or "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
