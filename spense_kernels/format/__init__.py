# SPDX-License-Identifier: Apache-2.0
"""The weight format: split, checkpoint form, packed form. Specified in docs/format.md."""

from spense_kernels.format.hybrid_weight import HybridWeight
from spense_kernels.format.packed import PackedWeight
from spense_kernels.format.split import Run, Split
from spense_kernels.format.tile_stream import pack_reference, unpack_reference

__all__ = ["HybridWeight", "PackedWeight", "Run", "Split", "pack_reference", "unpack_reference"]
