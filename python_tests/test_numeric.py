# SPDX-License-Identifier: Apache-2.0
"""The comparisons that other tests rest on, and the promises of the operand generators."""

from __future__ import annotations

import math

import pytest
import torch

from spense_kernels.quant import fp8_to_float
from spense_kernels.testing.generators import (
    EXACT_SUM,
    exact_activations,
    exact_weight,
    legal_widths,
    random_split,
    random_weight,
)
from spense_kernels.testing.numeric import assert_bitwise, bitwise_report, tile_diff
from spense_kernels.testing.reference import (
    gathered_weight,
    hybrid_gemm_float64,
    hybrid_gemm_plain,
)


def test_tile_diff_finds_the_worst_tile():
    ref = torch.ones(300, 200)
    out = ref.clone()
    out[140, 150] += 4  # tile (128, 128) has 128 x 72 elements
    out[0, 0] += 1
    found = tile_diff(out, ref)
    assert found.tile == (128, 128)
    assert found.rms == pytest.approx(math.sqrt(16 / (128 * 72)))
    assert (found.max_abs, found.max_at) == (4.0, (140, 150))


def test_tile_diff_edges():
    zeros = torch.zeros(5, 5)
    assert tile_diff(zeros, zeros).rms == 0
    assert tile_diff(zeros + 1e-30, zeros).rms == math.inf
    assert tile_diff(torch.full((5, 5), torch.nan), zeros + 1).rms == math.inf
    assert tile_diff(torch.empty(0, 5), torch.empty(0, 5)).rms == 0
    with pytest.raises(ValueError, match="must be 2-D"):
        tile_diff(zeros, zeros[0])


def test_bitwise_report_names_places():
    a = torch.tensor([[0.0, 1.0], [torch.nan, 2.0]])
    assert bitwise_report(a, a.clone()) == ""
    b = a.clone()
    b[0, 0], b[1, 1] = -0.0, 3.0
    assert bitwise_report(b, a).splitlines() == [
        "2 of 4 elements differ",
        "  [0, 0]: got -0.0, expected 0.0",
        "  [1, 1]: got 3.0, expected 2.0",
    ]
    assert "float16" in bitwise_report(a.half(), a)
    with pytest.raises(AssertionError, match="1 of 2 elements differ"):
        assert_bitwise(torch.tensor([1, 2]).view(torch.int64), torch.tensor([1, 3]))


@pytest.mark.parametrize("k", [3, 640, 8191, 8192, 27648])
def test_exact_operands_stay_exact(k):
    """No partial sum in any order reaches the limit, and the result fits float32 exactly."""
    weight = exact_weight(random_split(130, k, seed=k), seed=k, bias=True)
    x, scale = exact_activations(4, k, seed=k)
    assert set(fp8_to_float(weight.to_dense()).unique().tolist()) <= {-1.0, 0.0, 1.0}
    worst = fp8_to_float(x).abs() @ gathered_weight(weight).abs().t()
    assert float(worst.max()) < EXACT_SUM
    assert float(fp8_to_float(x).abs().sum(dim=1).max()) < EXACT_SUM
    exact = hybrid_gemm_float64(x, scale, weight)
    assert_bitwise(hybrid_gemm_plain(x, scale, weight, torch.float32).double(), exact)


def test_random_splits_use_every_width():
    assert legal_widths(100) == [0, 16, 32, 48, 64, 80, 96, 100]
    used = {w for seed in range(40) for w in random_split(300, 100, seed=seed).widths}
    assert used == set(legal_widths(100))
    weight = random_weight(random_split(300, 100, seed=1), seed=1, bias=True, negative_zeros=0.5)
    assert weight.validate().canonical().equal(weight)
