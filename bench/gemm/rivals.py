# SPDX-License-Identifier: Apache-2.0
"""What is timed: our op and what a user would pick instead, each on its own copies of a weight.

A rival holds the copies; `calls(m)` gives one call a copy, on fresh activations. Products come out
as bf16 [m, n] in rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gemm.operands import copies, random_fp8, random_x, tile_stream, tiles_of, two_of_four
from gemm.shapes import Layer
from gemm.timing import Call
from spense_kernels.format import Split
from spense_kernels.layout import ceil_div

BF16 = torch.bfloat16


class Spense:
    """hybrid_gemm: the tile stream at dense fraction d."""

    def __init__(self, layer: Layer, d: float, device: torch.device):
        self.layer, self.device = layer, device
        self.split = Split.from_fraction(layer.n, layer.k, d)
        self.streams = copies(tile_stream(self.split, device), device)
        self.tiles = tiles_of(self.split, device)
        self.w_scale = torch.rand(layer.n, device=device) + 0.5

    def calls(self, m: int, config: str | None = None, fast_accum: bool = True) -> list[Call]:
        n, k = self.layer.n, self.layer.k
        x = random_x(m, k, self.device)
        x_scale = torch.rand(m, device=self.device) + 0.5
        return [
            partial(
                torch.ops.spense.hybrid_gemm,
                *(x, stream, self.tiles, x_scale, self.w_scale),
                n=n,
                k=k,
                fast_accum=fast_accum,
                config=config,
            )
            for stream in self.streams
        ]


class CublasLt:
    """torch._scaled_mm in FP8 with fast accumulation."""

    def __init__(self, layer: Layer, device: torch.device, by_row: bool):
        self.layer, self.device, self.by_row = layer, device, by_row
        weight = random_fp8(layer.n, layer.k, device=device).view(torch.float8_e4m3fn)
        self.weights = copies(weight, device)

    def calls(self, m: int) -> list[Call]:
        x = random_x(m, self.layer.k, self.device)
        rows, columns = (m, self.layer.n) if self.by_row else (1, 1)
        x_scale = torch.rand(rows, 1, device=self.device) + 0.5
        w_scale = torch.rand(1, columns, device=self.device) + 0.5
        if not self.by_row:
            x_scale, w_scale = x_scale[0, 0], w_scale[0, 0]
        scales = {"scale_a": x_scale, "scale_b": w_scale}
        return [
            partial(torch._scaled_mm, x, w.t(), **scales, out_dtype=BF16, use_fast_accum=True)
            for w in self.weights
        ]


class BFloat16:
    """torch.nn.functional.linear in bf16."""

    def __init__(self, layer: Layer, device: torch.device):
        self.layer, self.device = layer, device
        self.weights = copies(torch.randn(layer.n, layer.k, dtype=BF16, device=device), device)

    def calls(self, m: int) -> list[Call]:
        x = torch.randn(m, self.layer.k, dtype=BF16, device=self.device)
        return [partial(torch.nn.functional.linear, x, w) for w in self.weights]


class CusparseLt:
    """cuSPARSELt FP8 2:4 on the first `columns` columns, best of all its algorithms.

    It has no scales, which spares it work. Tokens are padded to the 16 that it asks for. `best`
    takes one list of calls for each algorithm and returns the place of the fastest.
    """

    ROWS = 16

    def __init__(
        self,
        layer: Layer,
        device: torch.device,
        best: Callable[[list[list[Call]]], int],
        columns: int | None = None,
    ):
        self.layer, self.device, self.best = layer, device, best
        self.chosen: dict[int, tuple[int, int, int]] = {}  # tokens -> algorithm
        self.k = layer.k if columns is None else columns
        weight = torch._cslt_compress(two_of_four(layer.n, self.k, device))
        self.weights = copies(weight, device)

    def calls(self, m: int) -> list[Call]:
        padded = ceil_div(m, self.ROWS) * self.ROWS
        x = random_fp8(padded, self.k, device=self.device).view(torch.float8_e4m3fn)
        if padded not in self.chosen:
            choices = self._algorithms(x)
            self.chosen[padded] = choices[self.best([self._calls(x, c) for c in choices])]
        return self._calls(x, self.chosen[padded])

    def _calls(self, x: Tensor, choice: tuple[int, int, int]) -> list[Call]:
        return [partial(self._product, w, x.t(), choice) for w in self.weights]

    @staticmethod
    def _product(weight: Tensor, x: Tensor, choice: tuple[int, int, int]) -> Tensor:
        algorithm, split_k, mode = choice
        return torch._cslt_sparse_mm(
            weight,
            x,
            out_dtype=BF16,
            transpose_result=True,
            alg_id=algorithm,
            split_k=split_k,
            split_k_mode=mode,
        )

    def _algorithms(self, x: Tensor) -> list[tuple[int, int, int]]:
        """(algorithm, split K, its mode): what the library's search finds, then each that runs."""
        weight = self.weights[0]
        *searched, last = torch._C._cusparselt.mm_search(weight, x.t(), None, None, BF16, True)
        every = [(algorithm, 1, -1) for algorithm in range(last + 1)]
        choices = dict.fromkeys([tuple(map(int, searched)), *every])
        return [choice for choice in choices if self._runs(weight, x, choice)]

    def _runs(self, weight: Tensor, x: Tensor, choice: tuple[int, int, int]) -> bool:
        try:
            self._product(weight, x.t(), choice)
        except RuntimeError:
            return False
        return True


class TwoLibrary:
    """cuSPARSELt on the sparse columns, cuBLASLt on the dense ones, and with `add` their sum.

    Both find their activations in place: splitting x costs them nothing here.
    """

    def __init__(self, sparse: CusparseLt, dense: CublasLt, add: bool):
        self.sparse, self.dense, self.add = sparse, dense, add

    def calls(self, m: int) -> list[Call]:
        sparse, dense = self.sparse.calls(m), self.dense.calls(m)
        turns = max(len(sparse), len(dense))
        return [
            partial(self._both, m, sparse[i % len(sparse)], dense[i % len(dense)])
            for i in range(turns)
        ]

    def _both(self, m: int, sparse: Call, dense: Call) -> Tensor:
        y, part = sparse(), dense()
        return y[:m].add_(part) if self.add else y
