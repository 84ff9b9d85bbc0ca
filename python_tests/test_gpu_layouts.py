# SPDX-License-Identifier: Apache-2.0
"""gpu_layouts: the GPU kernels' layouts, descriptors and tensor maps against CuTe's, by g++."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_tools
import pytest

HERE = Path(__file__).parent / "gpu_layouts"
CSRC = cuda_tools.ROOT / "csrc"
SOURCES = (
    HERE / "sm100_layouts.cpp",
    HERE / "layouts.cpp",
    HERE / "no_kernels.cpp",
    CSRC / "sm100" / "launch.cpp",
    CSRC / "device" / "tensor_map.cpp",
)
# CuTe's tensor maps hide behind the version of nvcc; layouts.cpp takes the place of the driver.
FLAGS = (
    *("-std=c++20", "-O0", "-w"),
    *("-D__CUDACC_VER_MAJOR__=13", "-D__CUDACC_VER_MINOR__=0"),
    "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL=1",
)
# What is compared, and how often at least: every byte of a tile of every config, every slot.
KINDS = {
    "sparse values": 128 * 256,
    "dense values": 128 * 128,
    "metadata": 128 * 256,
    "x": 16 * 128,
    "descriptor of sparse values": 4 * 8,
    "descriptor of dense values": 4 * 8,
    "descriptor of x, sparse": 4 * 8,
    "descriptor of x, dense": 4 * 8,
    "descriptor of metadata": 2 * 8,
    "sparse instruction": 1,
    "dense instruction": 1,
    "metadata of an instruction": 4,
    "place of metadata": 128 * 256,
    "target of metadata": 2 * 8,
    "place of a sum": 128 * 16,
    "tensor map of x, box": 5,
    "tensor map of x, swizzle": 1,
    "tensor map of w, box": 5,  # of pairs of CTAs
    "tensor map of w, swizzle": 1,
}


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu_layouts")
    includes = [word for d in [HERE, CSRC, *cuda_tools.cuda_includes()] for word in ("-I", d)]

    def compiled(source: Path) -> Path:
        out = folder / f"{source.parent.name}_{source.stem}.o"
        subprocess.run(["g++", *FLAGS, *includes, "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    out = folder / "layouts"
    subprocess.run(["g++", *objects, "-o", out], check=True)
    return out


def compared(text: str) -> dict[str, tuple[int, int]]:
    rows = re.findall(r"^(.+?) +(\d+) compared, (\d+) different$", text, re.MULTILINE)
    return {name: (int(count), int(different)) for name, count, different in rows}


def test_every_byte_is_where_cute_puts_it(program):
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    counts = compared(done.stdout)
    names = re.findall(
        r"^INSTANCE\((\w+),",
        (CSRC / "heuristics" / "sm100_instances.def").read_text(),
        re.MULTILINE,
    )
    assert re.findall(r"^config (\w+)$", done.stdout, re.MULTILINE) == names
    for kind, least in KINDS.items():
        configs = sum("_g2_" in n for n in names) if "map of w" in kind else len(names)
        assert counts[kind][0] >= least * configs, kind
    assert all(different == 0 for _, different in counts.values())


def test_a_difference_is_noticed(program):
    done = subprocess.run([program, "--disagree"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    counts = compared(done.stdout)
    assert set(KINDS) <= set(counts)
    assert all(different == count for count, different in counts.values())
