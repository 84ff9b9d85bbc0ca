# SPDX-License-Identifier: Apache-2.0
"""Hints of the next weight: while one layer's GEMM ends, the kernel brings the first bytes of the
next one's weight into the cache (`ops.hybrid_gemm`, next_w_packed). Results do not depend on it.

A link is a plain attribute that refers to the buffers of the next layer. State dicts and saved
files do not see it, moved weights are followed, and copies and pickles of a model come without;
`link_prefetch` makes it anew.
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from spense_kernels.linear import PackedLinear, SpenseLinear


def link_prefetch(model: nn.Module) -> int:
    """Tells every SpenseLinear (or fused group of them) which one runs next, in place.

    Taken for the order of execution is that in which the modules were registered, as decoders of
    transformers do it: q, k, v, o, gate, up, down, and then the next decoder layer. Older links
    are dropped first. Weights that get replaced later stay in memory until the model is linked anew
    or `unlink_prefetch` is called (`neighbours.fuse` and `unfuse` do so).

    Returns the number of links.
    """
    unlink_prefetch(model)
    layers = (m for m in model.modules() if isinstance(m, SpenseLinear) and m.split is not None)
    in_turn = list(dict.fromkeys(layer.gemm for layer in layers))
    for layer, following in pairwise(in_turn):
        layer.following = following._buffers
    return max(0, len(in_turn) - 1)


def unlink_prefetch(model: nn.Module) -> int:
    """Removes all links in `model`; returns how many there were."""
    count = 0
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.following is not None:
            module.following = None
            count += 1
    return count
