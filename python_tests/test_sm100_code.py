# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of the SM100 kernels: tensor instructions and their kind, copies, tensor
memory, no local memory. PTX names sparse and dense instructions apart, SASS does not."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cuda_tools
import pytest

from spense_kernels import _load

CSRC = cuda_tools.ROOT / "csrc"
LINES = [
    line[len("INSTANCE(") : line.rindex(")")]
    for line in (CSRC / "heuristics" / "sm100_instances.def").read_text().splitlines()
    if line.startswith("INSTANCE(")
]
NAMES = [line.split(",")[0] for line in LINES]
INSTRUCTIONS = 4  # of a unit
EPILOGUE_LOOPS = 4  # sums of a part, and one for each output type


def numbers(name: str) -> list[int]:
    """tokens, ctas, pairs, w_stages, x_stages, residency"""
    return [int(v) for v in LINES[NAMES.index(name)].split(",")[1:]]


def commits(pairs: int) -> int:
    """Slots of w and x, the sums, the drain between sparse and dense; blocks that a pair passes."""
    return 7 if pairs == 1 else 10


@pytest.fixture(scope="module")
def ptx(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ptx")
    nvcc = cuda_tools.nvcc()

    def one(line: str) -> str:
        source = folder / f"{line.split(',')[0]}.cu"
        source.write_text((CSRC / "sm100" / "instance.cu.in").read_text().replace("@LINE@", line))
        out = source.with_suffix(".ptx")
        command = [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-arch=compute_100a"]
        subprocess.run([*command, "-I", CSRC, "-ptx", source, "-o", out], check=True)
        return out.read_text()

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(NAMES, pool.map(one, LINES), strict=True))


@pytest.fixture(scope="module")
def sass(tmp_path_factory) -> dict[str, str]:
    """Of the kernels in the library that was built, by name of the config."""
    library = _load.LIBRARY_FOLDER / "libspense_cuda.so"
    if "100a" not in _load.build_info()["archs"]:
        cuda_tools.missing("the libraries were built without 100a")
    disassembler, folder = cuda_tools.nvdisasm(), tmp_path_factory.mktemp("sass")
    build_info, found = cuda_tools.script("build_info"), {}
    for section, content in build_info.sections(library.read_bytes()):
        if section != ".nv_fatbin":
            continue
        for number, (arch, image) in enumerate(build_info.cubins(content)):
            kernels = [s for s, _ in build_info.sections(image) if ".text." in s and "sm100" in s]
            if arch != 100 or not kernels:
                continue
            path = folder / f"{number}.cubin"
            path.write_bytes(image)
            command = [disassembler, "-c", path]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            values = [int(v) for v in re.findall(r"Li(\d+)E", kernels[0])]
            found[next(n for n in NAMES if numbers(n) == values)] = text
    return found


def opcodes(text: str) -> Counter:
    """Of SASS, without their suffixes."""
    return Counter(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", text))


@pytest.mark.parametrize("name", NAMES)
def test_ptx(ptx, name):
    text = ptx[name]
    _, ctas, pairs, *_ = numbers(name)
    group = f"cta_group::{ctas}"
    groups = set(re.findall(r"tcgen05\.\S*(cta_group::\d)", text))
    assert groups == {group}, "all tensor instructions of a kernel must agree"

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    assert count(rf"tcgen05\.mma\.sp\.{group}\.kind::f8f6f4 ") == INSTRUCTIONS
    assert count(rf"tcgen05\.mma\.{group}\.kind::f8f6f4 ") == INSTRUCTIONS
    assert count(r"tcgen05\.mma") == 2 * INSTRUCTIONS
    assert count(rf"tcgen05\.cp\.{group}\.128x128b ") == 2
    assert count(r"tcgen05\.alloc") == count(r"tcgen05\.dealloc") == 1
    assert count(r"tcgen05\.relinquish_alloc_permit") == 1
    assert count(r"tcgen05\.ld\.") == count(r"tcgen05\.wait::ld") == EPILOGUE_LOOPS
    assert count(r"tcgen05\.commit") == commits(pairs)
    assert count(r"multicast::cluster\.L2") == (3 if pairs == 2 else 0)
    assert count(r"griddepcontrol\.launch_dependents") == 1
    assert count(r"griddepcontrol\.wait") == 2
    assert count(r"\.local\.") == 0


@pytest.mark.parametrize("name", NAMES)
def test_sparsity_bit_of_the_instruction_descriptors(ptx, name):
    """Bit 2 says sparse; the opcode and the descriptor must agree."""
    tokens, ctas, *_ = numbers(name)
    text = ptx[name]
    both = (tokens // 8) << 17 | (128 * ctas // 16) << 24 | 1 << 4
    for pattern, expected in (
        (r"tcgen05\.mma\.sp\.\S+ \[%r\d+\], %rd\d+, %rd\d+, \[%r\d+\], (%r\d+)", both | 1 << 2),
        (r"tcgen05\.mma\.cta\S+ \[%r\d+\], %rd\d+, %rd\d+, (%r\d+)", both),
    ):
        registers = re.findall(pattern, text)
        assert len(registers) == INSTRUCTIONS
        for register in registers:
            values = re.findall(rf"mov\.b32\s+{re.escape(register)}, (-?\d+);", text)
            assert [int(v) for v in values] == [expected]


@pytest.mark.parametrize("name", NAMES)
def test_sass(sass, name):
    _, ctas, pairs, *_ = numbers(name)
    text, count = sass[name], opcodes(sass[name])
    assert count["UTCQMMA"] == 2 * INSTRUCTIONS
    assert count["UTCCP"] == 2
    assert count["UTCBAR"] == commits(pairs)
    assert count["LDTM"] == EPILOGUE_LOOPS
    assert count["LDL"] == count["STL"] == 0, "local memory: a spill or an indexed array"
    # Units: bulk copies, or boxes of two tensor maps; x: two blocks of a sparse unit, one else.
    assert count["UBLKCP"] == (2 if ctas == 1 else 0)
    assert count["UTMALDG"] == (3 if ctas == 1 else 5)
    assert ("UTCQMMA.2CTA" in text) == (ctas == 2)
    assert text.count("FIND_AND_SET") >= 1, "no allocation of tensor memory"
    assert count["ACQBULK"] == 2
    assert count["PREEXIT"] == 1


def test_every_config_is_in_the_library(sass):
    assert sorted(sass) == sorted(NAMES)


def test_other_architectures_get_an_empty_kernel(tmp_path):
    """tcgen05 does not exist elsewhere; there the op says that it has no kernel."""
    text = (CSRC / "sm100" / "sources.cmake").read_text()
    assert re.findall(r"ARCHS ([^S]+) SOURCES", text) == ["100a"]
    source = tmp_path / "kernel.cu"
    source.write_text((CSRC / "sm100" / "instance.cu.in").read_text().replace("@LINE@", LINES[0]))
    out = source.with_suffix(".ptx")
    command = [cuda_tools.nvcc(), "-std=c++20", "--expt-relaxed-constexpr", "-arch=compute_90a"]
    subprocess.run([*command, "-I", CSRC, "-ptx", source, "-o", out], check=True)
    body = out.read_text().split(".entry", 1)[1]
    assert re.findall(r"^\s+([a-z][a-z0-9._]*)[^:\n]*;", body, re.MULTILINE) == ["ret"]
