# SPDX-License-Identifier: Apache-2.0
"""The CUDA row kernels on the host: every thread a fiber, every CTA a host thread.

Indices, barriers, slices, clusters and tails are those of the GPU; only leaves (device/ptx*.cuh,
conversions, the launch) are replaced. Norms must equal the CPU op bit for bit.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spense_kernels import ops
from spense_kernels.layout import padded_k
from spense_kernels.quant import quantize_fp8_reference
from spense_kernels.testing.generators import generator
from spense_kernels.testing.neighbours import GATED_ERROR, gated_float64, quantized_excess
from spense_kernels.testing.numeric import assert_bitwise

ROOT = Path(__file__).parents[1]
HOST = Path(__file__).with_name("host")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ACTIVATIONS = [None, "tanh", "none"]  # approximate of the GELU, in the order of the enum
EPS = 1e-6


def compile_program(folder: Path, sources: Path) -> Path:
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    program = folder / "row_kernels"
    flags = ["-std=c++20", "-O1", "-w", "-ffp-contract=off", "-fno-extern-tls-init", "-pthread"]
    includes = [f"-I{HOST / 'fibers'}", f"-I{sources}"]
    command = ["g++", *flags, *includes, HOST / "row_kernels.cpp", "-o", program]
    subprocess.run(command, check=True, timeout=600)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return compile_program(tmp_path_factory.mktemp("program"), ROOT / "csrc")


@dataclass
class Case:
    """Inputs of one launch; stride is that of both inputs, in elements."""

    m: int
    k: int
    dtype: torch.dtype
    gather: bool
    stride: int
    multiprocessors: int = 4

    def __post_init__(self):
        g = generator(self.m * 1000 + self.k)
        self.x, self.second = (
            (2 * torch.randn(self.m, self.stride, generator=g)).to(self.dtype) for _ in range(2)
        )
        self.order = torch.randperm(self.k, generator=g, dtype=torch.int32) if self.gather else None

    def columns(self, tensor: Tensor) -> Tensor:
        return tensor[:, : self.k]

    def run(
        self, program: Path, tmp_path: Path, what: str, weight: Tensor | None, flag: int, second
    ):
        tensors = [self.x, *([self.second] if second else []), weight, self.order]
        data = b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors if t is not None)
        (tmp_path / "in").write_bytes(data)
        kind = 0 if weight is None else 1 + int(weight.dtype != self.dtype)
        numbers = (self.m, self.k, DTYPES.index(self.dtype), self.stride, self.multiprocessors)
        words = (*numbers, int(self.gather), int(second), kind, flag, EPS)
        command = [program, tmp_path / "in", tmp_path / "out", what, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        raw = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=torch.uint8)
        rows = self.m * padded_k(self.k)
        y = raw[:rows].view(self.m, -1)
        assert not y[:, self.k :].any(), "padding is zero"
        scale = raw[rows : rows + 4 * self.m].clone().view(torch.float32)
        total = raw[rows + 4 * self.m :].clone().view(self.dtype).view(self.m, self.k)
        return y[:, : self.k], scale, total, done.stdout


CASES = [
    Case(3, 200, torch.bfloat16, True, 200),
    Case(2, 1, torch.float32, True, 1),
    Case(2, 127, torch.float16, False, 127),
    Case(1, 5120, torch.bfloat16, True, 5120),
    Case(1, 5000, torch.bfloat16, True, 5000, multiprocessors=132),  # CTAs share the gather
    Case(1, 8200, torch.bfloat16, True, 8200),  # clusters of 2 and of 4
    Case(1, 25600, torch.bfloat16, True, 25600),  # of 4
    Case(1, 25600, torch.bfloat16, False, 25600),
    Case(1, 60000, torch.float32, True, 60000),  # too long for one CTA
    Case(1, 25600, torch.float32, True, 25600),
    Case(2, 60007, torch.float16, True, 60013, multiprocessors=1),  # and not aligned
    Case(5, 640, torch.bfloat16, True, 643),
    # what GEMMs leave of a multiprocessor: one vector, two, four
    Case(3, 6800, torch.bfloat16, True, 6800),
    Case(3, 8000, torch.float16, True, 8000),
    Case(3, 8000, torch.float32, False, 8000),
    Case(3, 13000, torch.bfloat16, False, 13000),
    Case(1, 70000, torch.bfloat16, True, 70000),  # places of a gather in more than 16 bits
    # CTAs that stay: two rows at a time, four, one long row; as loads and as copies
    *[Case(9, 650, dtype, True, 656, multiprocessors=1) for dtype in DTYPES],
    *[Case(22, 650, dtype, True, 656, multiprocessors=1) for dtype in DTYPES],
    Case(22, 650, torch.bfloat16, True, 651, multiprocessors=1),
    Case(21, 384, torch.float16, False, 384, multiprocessors=1),
    Case(14, 5300, torch.bfloat16, True, 5304, multiprocessors=1),
    Case(3, 9000, torch.float16, True, 9000, multiprocessors=1),
    Case(4, 17000, torch.bfloat16, True, 17008, multiprocessors=1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.m}x{c.k}-{c.dtype}-{c.gather}")
def test_norms_are_the_cpus_bit_for_bit(program, tmp_path, case):
    g = generator(case.k)
    for unit_offset in (False, True):
        weight = torch.randn(case.k, generator=g).to(case.dtype if unit_offset else torch.float32)
        inputs = case.columns(case.x), case.columns(case.second)
        keys = {"eps": EPS, "unit_offset": unit_offset}
        y, scale, _, _ = case.run(program, tmp_path, "norm", weight, int(unit_offset), False)
        wanted, wanted_scale = ops.rms_norm_quantize(inputs[0], weight, case.order, **keys)
        assert_bitwise(scale, wanted_scale)
        assert_bitwise(y, wanted.view(torch.uint8))
        y, scale, total, _ = case.run(program, tmp_path, "norm", weight, int(unit_offset), True)
        wanted, wanted_scale, sums = ops.add_rms_norm_quantize(*inputs, weight, case.order, **keys)
        assert_bitwise(total, sums)
        assert_bitwise(scale, wanted_scale)
        assert_bitwise(y, wanted.view(torch.uint8))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.m}x{c.k}-{c.dtype}-{c.gather}")
def test_activations_are_within_their_bound(program, tmp_path, case):
    gate, up = case.columns(case.x), case.columns(case.second)
    for flag, approximate in enumerate(ACTIVATIONS):
        y, scale, _, _ = case.run(program, tmp_path, "gated", None, flag, True)
        v = gated_float64(gate, up, approximate)
        v = v if case.order is None else v[:, case.order.long()]
        assert quantized_excess(y.view(torch.float8_e4m3fn), scale, v, GATED_ERROR) <= 0


@pytest.mark.parametrize(
    "case",
    [*CASES, Case(2, 140000, torch.bfloat16, True, 140000)],  # too long for registers
    ids=lambda c: f"{c.m}x{c.k}-{c.dtype}-{c.gather}",
)
def test_quantised_rows_are_the_twins_bit_for_bit(program, tmp_path, case):
    y, scale, _, _ = case.run(program, tmp_path, "plain", None, 0, False)
    wanted, wanted_scale = quantize_fp8_reference(case.columns(case.x), case.order)
    assert_bitwise(scale, wanted_scale)
    assert_bitwise(y, wanted.view(torch.uint8))


def test_clusters_are_taken_where_rows_are_few_and_long(program, tmp_path):
    def cluster(m: int, k: int, what: str, multiprocessors: int) -> str:
        case = Case(m, k, torch.bfloat16, False, k, multiprocessors)
        weight = torch.ones(k) if what == "norm" else None
        return case.run(program, tmp_path, what, weight, 0, what == "gated")[3].split(", ")[2]

    assert cluster(1, 25600, "gated", 132) == "cluster 8"
    assert cluster(40, 2048, "gated", 4) == "cluster 1"
    assert cluster(1, 8192, "norm", 132) == "cluster 1"
    assert cluster(1, 16384, "norm", 132) == "cluster 2"


def test_a_row_that_is_not_finite(program, tmp_path):
    case = Case(3, 8192, torch.bfloat16, True, 8192)
    case.x[1, 8000] = torch.nan
    y, scale, _, _ = case.run(program, tmp_path, "norm", torch.ones(8192), 0, False)
    assert scale.isnan().tolist() == [False, True, False]
    assert (y[1] == 0x7F).all()


def test_a_wrong_place_in_a_cluster_is_noticed(tmp_path):
    """The same program, but bytes for the other CTAs of the cluster miss by 16 columns."""
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    header = sources / "cuda" / "held_rows.cuh"
    text = header.read_text()
    wrong = text.replace(
        "remote_address(from, threadIdx.x)", "remote_address(from ^ 16, threadIdx.x)"
    )
    assert wrong != text
    header.write_text(wrong)
    case = Case(1, 16384, torch.bfloat16, True, 16384)
    program = compile_program(tmp_path, sources)
    weight = torch.ones(16384)
    y, _, _, _ = case.run(program, tmp_path, "norm", weight, 0, False)
    wanted, _ = ops.rms_norm_quantize(case.columns(case.x), weight, case.order, eps=EPS)
    assert not torch.equal(y, wanted.view(torch.uint8))
