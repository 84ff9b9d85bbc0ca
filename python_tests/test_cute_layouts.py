# SPDX-License-Identifier: Apache-2.0
"""The tile stream against CuTe's own layouts, in a host program (host/cute_layouts.cpp)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("host") / "cute_layouts.cpp"


def cutlass_headers() -> Path | None:
    spec = importlib.util.find_spec("cutlass_library")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        headers = Path(folder) / "source" / "include"
        if (headers / "cutlass" / "version.h").is_file():
            return headers
    return None


def cuda_headers() -> Path | None:
    """Headers of the toolkit that the build would take; none are compiled for a GPU here."""
    finder = [sys.executable, ROOT / "cmake" / "find_cuda.py", "--nvcc"]
    nvcc = subprocess.run(finder, capture_output=True, text=True, check=False).stdout.strip()
    if not nvcc:
        return None
    # A wrapper or a link hides the toolkit; the compiler itself tells where it is.
    command = [nvcc, "-v", "--dryrun", "-x", "cu", "-c", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    here = re.search(r"_HERE_=(.+)", told)
    folder = Path(here[1]) if here else Path(nvcc).resolve().parent
    headers = folder.parent / "include"
    return headers if (headers / "cuda_runtime.h").is_file() else None


@pytest.fixture(scope="module")
def headers() -> list[Path]:
    cutlass, cuda = cutlass_headers(), cuda_headers()
    missing = [
        name
        for name, found in (
            ("g++", shutil.which("g++")),
            ("the package nvidia-cutlass", cutlass),
            ("a CUDA toolkit's headers", cuda),
        )
        if not found
    ]
    if missing:
        reason = f"needs {' and '.join(missing)}"
        if os.environ.get("SPENSE_REQUIRE_CUDA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return [cutlass, cuda, cuda / "cccl"]


def run(headers: list[Path], ours: Path, folder: Path) -> tuple[int, dict[str, int]]:
    """Exit code and, for each comparison, the number of places that differ."""
    program = folder / "cute_layouts"
    includes = [f"-I{path}" for path in (ours, *headers)]
    flags = ["-std=c++17", "-O1", "-w", "-x", "c++"]
    subprocess.run(["g++", *flags, *includes, PROGRAM, "-o", program], check=True, timeout=600)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    found = re.findall(r"^(.+?) +(\d+) of \d+ bytes differ$", done.stdout, re.MULTILINE)
    return done.returncode, {name: int(count) for name, count in found}


def test_every_byte_of_a_unit_stands_where_cute_puts_it(headers, tmp_path):
    code, differences = run(headers, ROOT / "csrc", tmp_path)
    assert code == 0
    assert len(differences) == 7
    assert not any(differences.values())


def test_another_layout_is_noticed(headers, tmp_path):
    """The same program on a header without the swizzle and with two metadata rows exchanged."""
    header = (ROOT / "csrc" / "format" / "tile_stream.h").read_text()
    wrong = header.replace("((j / 16) ^ (m % 8))", "(j / 16)").replace(
        "m * kMetadataRowBytes", "(m ^ 1) * kMetadataRowBytes"
    )
    assert "^ (m % 8)" in header
    assert "^ (m % 8)" not in wrong
    assert "(m ^ 1)" in wrong
    (tmp_path / "format").mkdir()
    (tmp_path / "format" / "tile_stream.h").write_text(wrong)
    code, differences = run(headers, tmp_path, tmp_path)
    assert code != 0
    assert differences["sm90 metadata of a lane"] == 0, "only distances inside a row matter there"
    others = [count for name, count in differences.items() if name != "sm90 metadata of a lane"]
    assert len(others) == 6
    assert all(others)
