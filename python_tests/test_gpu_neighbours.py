# SPDX-License-Identifier: Apache-2.0
"""Norms and gated activations with quantisation on CUDA: norms give the CPU's bits, activations
what float64 allows."""

from __future__ import annotations

import pytest
import torch
from devices import all_devices, same_bits
from torch import Tensor

from spense_kernels import ops
from spense_kernels.layout import padded_k
from spense_kernels.testing.generators import generator, random_activations
from spense_kernels.testing.neighbours import (
    GATED_ERROR,
    gated_float64,
    quantized_excess,
)
from spense_kernels.testing.numeric import assert_bitwise

EPS = 1e-6
GATED = {"silu": None, "tanh": "tanh", "none": "none"}  # id -> approximate of the GELU
# One row and few take a cluster of CTAs, many a CTA each, 300 and 2000 several a CTA.
ROWS = [1, 3, 40, 200, 300, 2000]
CASES = [
    (torch.bfloat16, k, m) for k in (1, 77, 640, 5120, 8192, 25600, 27648, 60000) for m in ROWS
]
CASES += [
    (dtype, k, m) for dtype in (torch.float16, torch.float32) for k in (77, 5120) for m in ROWS
]
MOST = 1 << 21  # elements: the CPU computes them too


def run_gated(gate: Tensor, up: Tensor, kind: str, gather: Tensor | None):
    if kind == "silu":
        return ops.silu_mul_quantize(gate, up, gather)
    return ops.gelu_mul_quantize(gate, up, gather, approximate=kind)


def compare_rows(got, wanted, k: int) -> None:
    """Equal bits in all rows, but for a share of k * 2^-32 (so none of a few thousand): none was
    ever seen, the docstring of rms_norm_quantize says why it may be."""
    differing = (got[1].cpu().view(torch.int32) != wanted[1].view(torch.int32)).nonzero()
    assert len(differing) <= int(wanted[1].numel() * k * 2.0**-32)
    same = got[1].cpu() == wanted[1]
    assert_bitwise(got[0].cpu().view(torch.uint8)[same], wanted[0].view(torch.uint8)[same])


def case(dtype: torch.dtype, k: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual, weight, gather."""
    m = max(1, min(m, MOST // k))
    g = generator(k + m)
    x, residual = (torch.randn(m, k, generator=g).to(dtype) * 3 for _ in range(2))
    weight = torch.randn(k, generator=g).to(dtype)
    return x, residual, weight, torch.randperm(k, generator=g, dtype=torch.int32)


@all_devices
@pytest.mark.parametrize(("dtype", "k", "m"), CASES, ids=str)
def test_norms_have_the_bits_of_the_cpu(device, dtype, k, m):
    x, residual, weight, order = case(dtype, k, m)
    for gather in (None, order):
        there = None if gather is None else gather.to(device)
        for unit_offset in (False, True):
            keys = {"eps": EPS, "unit_offset": unit_offset}
            got = ops.rms_norm_quantize(x.to(device), weight.to(device), there, **keys)
            compare_rows(got, ops.rms_norm_quantize(x, weight, gather, **keys), k)
        inputs = (x, residual, weight)
        got = ops.add_rms_norm_quantize(*(t.to(device) for t in inputs), there, **keys)
        wanted = ops.add_rms_norm_quantize(*inputs, gather, **keys)
        assert_bitwise(got[2].cpu(), wanted[2])
        compare_rows(got[:2], wanted[:2], k)


@all_devices
@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize(("dtype", "k", "m"), CASES, ids=str)
def test_activations_are_within_their_bound(device, dtype, k, m, kind):
    gate, up, _, order = (t.to(device) for t in case(dtype, k, m))
    exact = gated_float64(gate, up, GATED[kind])
    for gather in (None, order):
        x8, scale = run_gated(gate, up, kind, gather)
        v = exact if gather is None else exact[:, gather.long()]
        assert quantized_excess(x8, scale, v, GATED_ERROR) <= 0
        padding = x8.as_strided((len(x8), padded_k(k)), (padded_k(k), 1)).view(torch.uint8)
        assert not padding[:, k:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1601, 600])
@pytest.mark.parametrize("k", [5120, 8192])
def test_many_rows_of_a_model_have_the_bits_of_the_cpu(k, m):
    g = generator(k)
    x = torch.randn(m, k, generator=g).to(torch.bfloat16)
    weight = torch.randn(k, generator=g).to(torch.bfloat16)
    gather = torch.randperm(k, generator=g, dtype=torch.int32)
    there = [t.cuda() for t in (x, x.flip(0), weight, gather)]
    got = ops.add_rms_norm_quantize(*there, eps=EPS)
    wanted = ops.add_rms_norm_quantize(x, x.flip(0), weight, gather, eps=EPS)
    assert_bitwise(got[2].cpu(), wanted[2])
    compare_rows(got[:2], wanted[:2], k)


@all_devices
def test_rows_need_not_be_aligned(device):
    wide = torch.full((9, 5131), torch.nan, dtype=torch.bfloat16)
    x = random_activations(9, 5120)
    wide[:, 11:] = x
    weight = torch.randn(5120)
    moved = wide.to(device)[:, 11:]
    got = ops.add_rms_norm_quantize(moved, moved, weight.to(device), eps=EPS)
    compare_rows(got[:2], ops.add_rms_norm_quantize(x, x, weight, eps=EPS)[:2], 5120)
    x8, scale = ops.silu_mul_quantize(moved, moved)
    assert quantized_excess(x8.cpu(), scale.cpu(), gated_float64(x, x), GATED_ERROR) <= 0


@all_devices
def test_rows_that_are_not_finite(device):
    x = torch.randn(4, 640, device=device).to(torch.bfloat16)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    ones = torch.ones_like(x)
    norm = ops.rms_norm_quantize(x, ones[0].contiguous(), eps=EPS)
    for x8, scale in (norm, ops.silu_mul_quantize(x, ones)):
        assert scale.isnan().tolist() == [False, True, True, False]
        assert (x8[1:3].view(torch.uint8) == 0x7F).all()


@pytest.mark.gpu
def test_a_chain_in_a_graph_gives_the_same_bits():
    """Launches that overlap, each reading what the one ahead writes, as in a decoder layer."""
    x, residual, weight, gather = (t.cuda() for t in case(torch.bfloat16, 5120, 16))

    def chain():
        _, _, total = ops.add_rms_norm_quantize(x, residual, weight, gather, eps=EPS)
        _, _, total = ops.add_rms_norm_quantize(x, total, weight, gather, eps=EPS)
        x8, scale = ops.silu_mul_quantize(total, x, gather)
        return total, x8, scale

    wanted = chain()
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = chain()
    for _ in range(20):
        for t in got:
            t.view(torch.uint8).fill_(0xFF)
        graph.replay()
        torch.cuda.synchronize()
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))
