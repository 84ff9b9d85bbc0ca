# SPDX-License-Identifier: Apache-2.0
"""Builds a CUDA source of the benchmarks and loads it; finds other programs of the toolkit."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / ".cache" / "bench"


def build(source: Path, arch: str = "90a") -> Path:
    """The shared library of a source file, made anew; with 90 it runs on later devices too.

    Raises:
        RuntimeError: no nvcc is found. subprocess.CalledProcessError: it fails.
    """
    finder = [sys.executable, str(ROOT / "cmake" / "find_cuda.py"), "--nvcc"]
    nvcc = subprocess.run(finder, capture_output=True, text=True, check=True).stdout.strip()
    if not nvcc:
        raise RuntimeError(f"{source.name}: expected an nvcc >= 12.8, got none")
    target = BUILT / f"{source.stem}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
    flags += [f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]", "-o", str(target)]
    subprocess.run([nvcc, *flags, str(source)], check=True)
    return target


def toolkit_program(name: str, title: str = "") -> str:
    """The program, on PATH or where the toolkit puts it; SystemExit where there is none."""
    found = shutil.which(name) or f"/usr/local/cuda/bin/{name}"
    if not os.path.exists(found):
        raise SystemExit(f"expected {title or name} on PATH, got none")
    return found


@cache
def library(source: Path) -> ctypes.CDLL:
    """The same, built once a process and loaded."""
    return ctypes.CDLL(str(build(source)))
