# SPDX-License-Identifier: Apache-2.0
"""Attention over whole windows: causal kernels in place of masks that say no more than causal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

NAME = "spense_windows"
# (window of the layer, length) of masks that were found to be causal and nothing else.
_causal: set[tuple[int | None, int]] = set()


@contextmanager
def causal_windows(*models: nn.Module) -> Iterator[None]:
    """Let sdpa attention of transformers models run without a mask where causal says it all.

    That is for windows without padding, no longer than a layer's sliding window: transformers
    writes the mask out when they are equally long, and always inside a CUDA graph, and kernels that
    read one are several times slower. Models with another attention are left alone.
    """
    found = [m for m in models if getattr(m.config, "_attn_implementation", None) == "sdpa"]
    if found:
        _register()
    _causal.clear()
    try:
        for model in found:
            model.set_attn_implementation(NAME)
        yield
    finally:
        for model in found:
            model.set_attn_implementation("sdpa")


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*args, **kwargs):
    """What transformers' sdpa_mask returns, or None where is_causal will do."""
    from transformers.masking_utils import sdpa_mask

    window, length = kwargs.get("local_size"), kwargs["kv_length"]
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if capturing:
        # Whether windows are packed cannot be read here, so transformers asks for all masks; those
        # seen before are known not to be.
        causal = (window, length) in _causal
    else:
        causal = kwargs.get("attention_mask") is None and kwargs.get("allow_is_causal_skip", True)
        causal = causal and (window is None or length <= window)
        if causal:
            _causal.add((window, length))
    if causal:
        return None
    return sdpa_mask(*args, **kwargs)
