# SPDX-License-Identifier: Apache-2.0
"""Compilers, headers and disassembler of CUDA for tests; a skip where they are missing, unless
SPENSE_REQUIRE_CUDA=1 demands them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]


def script(name: str):
    """A module of cmake/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "cmake" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing(reason: str) -> NoReturn:
    if os.environ.get("SPENSE_REQUIRE_CUDA") == "1":
        pytest.fail(f"SPENSE_REQUIRE_CUDA=1, but {reason}")
    pytest.skip(reason)


def nvcc() -> Path:
    found, reason = script("find_cuda").find_nvcc()
    return Path(found) if found else missing(reason)


def toolkit() -> Path:
    """The folder above nvcc's own bin, which a wrapper script hides."""
    command = [nvcc(), "-v", "--dryrun", "-x", "cu", "-c", "/dev/null"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Path(re.search(r"_HERE_=(.+)", text)[1]).parent


def cuda_includes() -> list[Path]:
    """CUDA's headers and those of CUTLASS."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None:
        missing("nvidia-cutlass is not installed (cmake/requirements-cuda.txt)")
    cutlass = Path(spec.submodule_search_locations[0]) / "source" / "include"
    include = toolkit() / "include"
    return [cutlass, include, include / "cccl"]


def nvdisasm() -> Path:
    places = [shutil.which("nvdisasm")]
    if script("find_cuda").find_nvcc()[0]:
        places.append(toolkit() / "bin" / "nvdisasm")
    for key in ("purelib", "platlib"):
        packages = Path(sysconfig.get_path(key))
        places += sorted(packages.glob("nvidia/cu[1-9][0-9]/bin/nvdisasm"), reverse=True)
        places.append(packages / "triton" / "backends" / "nvidia" / "bin" / "nvdisasm")
    for place in places:
        if place and Path(place).is_file():
            return Path(place)
    missing("no nvdisasm (nvidia-cuda-nvdisasm, cmake/requirements-cuda.txt)")
