# SPDX-License-Identifier: Apache-2.0
"""What tests of a device share. Bodies take the device, so the CPU tries them without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from conftest import why_no_gpu
from torch import Tensor

from spense_kernels import ops
from spense_kernels.format import HybridWeight, PackedWeight
from spense_kernels.testing.configs import gemm_configs
from spense_kernels.testing.numeric import bitwise_report
from spense_kernels.testing.reference import gathered_weight

NO_GPU = why_no_gpu()
cuda = pytest.param("cuda", marks=pytest.mark.gpu)
all_devices = pytest.mark.parametrize("device", ["cpu", cuda])

# One is enough to try a test's logic; test_gemm_cpu.py looks at all of them.
CPU_CONFIGS = gemm_configs("cpu")[:1]
GPU_CONFIGS = ["every"] if NO_GPU else gemm_configs("cuda")
every_config = pytest.mark.parametrize(
    ("device", "config"),
    [pytest.param("cpu", name) for name in CPU_CONFIGS]
    + [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in GPU_CONFIGS],
)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN (0xFF in bytes): outputs and workspaces that nobody fills show."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


@dataclass(frozen=True)
class Problem:
    """A weight on a device, packed and plain, to compare products of."""

    weight: HybridWeight  # on the CPU
    device: str

    @cached_property
    def packed(self) -> PackedWeight:
        return self.weight.pack(self.device)

    @cached_property
    def plain(self) -> Tensor:
        """float32 [n, k]: the unscaled weight in the order of x."""
        return gathered_weight(self.weight).to(self.device)

    @cached_property
    def w_scale(self) -> Tensor:
        return self.weight.w_scale.to(self.device)

    @cached_property
    def bias(self) -> Tensor | None:
        return None if self.weight.bias is None else self.weight.bias.to(self.device)

    def run(self, x: Tensor, x_scale: Tensor, config: str | None = None, **kwargs) -> Tensor:
        packed = self.packed
        return ops.hybrid_gemm(
            *(x, packed.w_packed, packed.w_tiles, x_scale, self.w_scale, self.bias),
            n=packed.n,
            k=packed.k,
            config=config,
            **kwargs,
        )

    def exact(self, x: Tensor, x_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        """The op's steps in float32, as `hybrid_gemm_plain`; right where the sum is exact."""
        y = (x.float() @ self.plain.t()) * x_scale[:, None] * self.w_scale
        y = y if self.bias is None else y + self.bias
        return y.to(out_dtype)

    def float64(self, x: Tensor, x_scale: Tensor) -> Tensor:
        """float64 [m, n], nothing rounded to less."""
        y = x.double() @ self.plain.double().t() * x_scale.double()[:, None]
        y = y * self.w_scale.double()
        return y if self.bias is None else y + self.bias.double()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree bit for bit, decided where they are."""
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_bits(out: Tensor, wanted: Tensor, what: str) -> None:
    """Bitwise but for the sign of zero, which depends on what a sum of zeros starts from."""
    out, wanted = out + 0.0, wanted + 0.0
    if not same_bits(out, wanted):
        pytest.fail(f"{what}: {bitwise_report(out.cpu(), wanted.cpu())}")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
