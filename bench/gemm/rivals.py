# SPDX-License-Identifier: Apache-2.0
"""What is timed: our op and what a user would pick instead, each on its own copies of a weight.

A rival holds the copies; `calls(m)` gives one call a copy, on fresh activations. Products come out
as bf16 [m, n] in rows. `count` copies where they are not to be rotated past the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from gemm.lost import DeviceLost, usable
from gemm.operands import copies, random_fp8, random_x, tile_stream, tiles_of, two_of_four
from gemm.shapes import Layer
from gemm.timing import Call
from spense_kernels.format import Split
from spense_kernels.layout import ceil_div

BF16 = torch.bfloat16
# cuSPARSELt's part is a multiple of so many columns. Of 4480 (an odd multiple of 128) it died with
# an illegal access; everything else that was ever timed was a multiple of 256.
SPARSE_COLUMNS = 256


class Spense:
    """hybrid_gemm: the tile stream at dense fraction d."""

    def __init__(self, layer: Layer, d: float, device: torch.device, count: int | None = None):
        self.layer, self.device = layer, device
        self.split = Split.from_fraction(layer.n, layer.k, d)
        self.streams = copies(tile_stream(self.split, device), device, count)
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
    """torch._scaled_mm in FP8 with fast accumulation, one scale for all or one a row."""

    def __init__(self, layer: Layer, device: torch.device, count: int | None = None):
        self.layer, self.device = layer, device
        weight = random_fp8(layer.n, layer.k, device=device).view(torch.float8_e4m3fn)
        self.weights = copies(weight, device, count)

    def calls(self, m: int, by_row: bool = False) -> list[Call]:
        x = random_x(m, self.layer.k, self.device)
        rows, columns = (m, self.layer.n) if by_row else (1, 1)
        x_scale = torch.rand(rows, 1, device=self.device) + 0.5
        w_scale = torch.rand(1, columns, device=self.device) + 0.5
        if not by_row:
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
    """cuSPARSELt FP8 2:4 on the first `columns` columns, the fastest of all its algorithms.

    It has no scales, which spares it work. Tokens are padded to the 16 that it asks for. `quick`
    takes a list of calls for each algorithm and gives rough times. What `avoid` names is not tried.

    Raises:
        RuntimeError: nothing runs on this shape. lost.DeviceLost: an algorithm broke the GPU.
    """

    ROWS = 16
    SPLIT_TOKENS = 128  # up to here the library's own search is asked as well: it may split K
    FEW = 2  # calls of an algorithm when it is chosen

    def __init__(
        self,
        layer: Layer,
        device: torch.device,
        quick: Callable[[list[list[Call]]], list[float]],
        columns: int | None = None,
        avoid: Collection[str] = (),
    ):
        self.layer, self.device, self.quick = layer, device, quick
        self.chosen: dict[int, tuple[int, int, int]] = {}  # tokens -> algorithm
        self.last: int | None = None  # number of the last algorithm
        self.k = layer.k if columns is None else columns
        self.avoid, self.shape = avoid, f"{layer.n}x{self.k}"
        if self.shape in avoid:
            raise RuntimeError("left out, as it broke the GPU before")
        weight = torch._cslt_compress(two_of_four(layer.n, self.k, device))
        self.weights = copies(weight, device)

    def calls(self, m: int) -> list[Call]:
        padded = ceil_div(m, self.ROWS) * self.ROWS
        x = random_fp8(padded, self.k, device=self.device).view(torch.float8_e4m3fn)
        if padded not in self.chosen:
            choices = self._algorithms(x)
            times = self.quick([self._calls(x, c)[: self.FEW] for c in choices])
            self.chosen[padded] = choices[times.index(min(times))]
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
        """(algorithm, split K, its mode) of all that run; each has run once then."""
        choices = []
        if self.last is None or x.shape[0] <= self.SPLIT_TOKENS:
            few = x[: self.SPLIT_TOKENS]
            search = torch._C._cusparselt.mm_search
            *searched, self.last = search(self.weights[0], few.t(), None, None, BF16, True)
            choices.append(tuple(map(int, searched)))
        choices += [(algorithm, 1, -1) for algorithm in range(self.last + 1)]
        tried = [c for c in dict.fromkeys(choices) if f"{self.shape}:{c[0]}" not in self.avoid]
        runs = {choice: self._why_not(x, choice) for choice in tried}
        found = [choice for choice, problem in runs.items() if problem is None]
        if not found:
            raise RuntimeError(f"no algorithm of {len(runs)} runs: {next(iter(runs.values()), '')}")
        return found

    def _why_not(self, x: Tensor, choice: tuple[int, int, int]) -> str | None:
        why = None
        try:
            self._product(self.weights[0], x.t(), choice)
        except RuntimeError as problem:
            why = str(problem)
        if not usable(self.device):
            raise DeviceLost([f"{self.shape}:{choice[0]}"])
        return why


def sparse_columns(split: Split) -> int:
    """Columns of two libraries' sparse part, for one dense width in every tile."""
    return round((split.k - split.widths[0]) / SPARSE_COLUMNS) * SPARSE_COLUMNS


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
