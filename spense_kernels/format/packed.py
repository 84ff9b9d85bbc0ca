# SPDX-License-Identifier: Apache-2.0
"""A weight in the packed form, the tile stream, that `hybrid_gemm` reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spense_kernels import ops
from spense_kernels.format.split import Split
from spense_kernels.layout import LAYOUT_VERSION


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Tile stream of a weight [n, k]; all tensors lie on one device.

    Attributes:
        w_packed: uint8 [Split.packed_bytes].
        w_tiles: int32 [ceil(n / 128) + 1, 4], the tile table.
        gather: int32 [k], the order in which x must stand (`Split.gather`).
        n, k: shape of the weight.
        layout: version of the tile stream.
    """

    w_packed: Tensor
    w_tiles: Tensor
    gather: Tensor
    n: int
    k: int
    layout: int = LAYOUT_VERSION

    @classmethod
    def pack(
        cls, split: Split, values: Tensor, indices: Tensor, dense: Tensor, device=None
    ) -> PackedWeight:
        """Packs the arrays of a HybridWeight with the op of their device, then moves the result to
        `device` (None: it stays)."""
        shape = {"n": split.n, "k": split.k}
        arrays = ops.pack(values, indices, dense, split.widths, **shape, k_shards=split.k_shards)
        device = values.device if device is None else device  # 0 is one
        return cls(*(t.to(device) for t in (*arrays, split.gather())), **shape)

    def unpack(self, split: Split) -> tuple[Tensor, Tensor, Tensor]:
        """Values, indices and dense bytes (canonical encoding); `split` must be the packed
        weight's.

        Raises RuntimeError when the stream is not one of `split`.
        """
        return ops.unpack(
            self.w_packed,
            self.w_tiles,
            split.widths,
            n=split.n,
            k=split.k,
            k_shards=split.k_shards,
            layout=self.layout,
        )

    def __repr__(self) -> str:
        return (
            f"PackedWeight(n={self.n}, k={self.k}, bytes={self.w_packed.numel()}, "
            f"layout={self.layout}, device={self.w_packed.device})"
        )
