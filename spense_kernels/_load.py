# SPDX-License-Identifier: Apache-2.0
"""Loads the op libraries: for the CPU always, for CUDA where torch has it and it was built."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import torch

LIBRARY_FOLDER = Path(__file__).parent / "lib"
MINIMUM_TORCH = (2, 11)
_BUILD_HINT = "Build it with: pip install --no-build-isolation -e ."


def check_torch(version: str) -> None:
    """Raises ImportError unless `version` is a torch that the libraries' stable ABI runs on."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or (int(found[1]), int(found[2])) < MINIMUM_TORCH:
        raise ImportError(f"spense_kernels: torch: expected version >= 2.11, got {version}")


def load_library(name: str, folder: Path = LIBRARY_FOLDER) -> None:
    """Loads folder/lib<name>.so and with it the registration of its ops; again is harmless.

    Raises ImportError that names the file when it is missing or cannot be loaded.
    """
    path = folder / f"lib{name}.so"
    if not path.is_file():
        raise ImportError(
            f"spense_kernels: {path}: expected a library, got no such file. {_BUILD_HINT}"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as problem:
        raise ImportError(
            f"spense_kernels: {path}: expected a library that loads beside torch "
            f"{torch.__version__}, got: {problem}"
        ) from problem


@cache
def build_info() -> dict:
    """What the build recorded: version, torch, torch_target, compiler, archs, cuda, kernels.

    `archs` is a list such as ["90a", "100a"], empty for a build without CUDA (then
    `no_cuda_because` says why); `kernels` lists the kernels found in the library for each of them.
    """
    path = LIBRARY_FOLDER / "build.json"
    if not path.is_file():
        raise ImportError(
            f"spense_kernels: {path}: expected a build record, got none. {_BUILD_HINT}"
        )
    return json.loads(path.read_text())


def why_no_cuda() -> str | None:
    """None where the CUDA ops are loaded, else the reason in words."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    if not build_info()["archs"]:
        return f"spense_kernels was built without CUDA: {build_info().get('no_cuda_because')}"
    return None


@cache
def load_ops() -> None:
    """Loads every op library that this process can use."""
    check_torch(torch.__version__)
    load_library("spense_ops_cpu")
    if why_no_cuda() is None:
        load_library("spense_ops_cuda")
