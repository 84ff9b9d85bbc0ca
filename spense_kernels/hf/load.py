# SPDX-License-Identifier: Apache-2.0
"""`spense_kernels.load`: from_pretrained that cannot come back with random weights."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from spense_kernels import neighbours
from spense_kernels.checkpoint.config import QUANT_METHOD
from spense_kernels.errors import CheckpointError

# Arguments that say where a config is found; the others concern the model.
_WHERE = ("cache_dir", "revision", "subfolder", "token", "local_files_only", "trust_remote_code")


def load(path: str | os.PathLike, *, fuse: bool | None = None, **kwargs: Any) -> nn.Module:
    """A causal language model from a spense checkpoint, in eval mode, frozen.

    Args:
        path: folder, or the name of a repository on the Hugging Face hub.
        fuse: whether q, k, v and gate, up become one GEMM each, and norms and activations quantise;
            None: on CUDA.
        kwargs: of `AutoModelForCausalLM.from_pretrained`, such as device_map and dtype.

    Raises CheckpointError when path is no spense checkpoint, or for anything wrong with it.
    """
    # Not above: this module is loaded while transformers itself is (spense_kernels/_register.py).
    from transformers import AutoConfig, AutoModelForCausalLM

    where = {key: kwargs[key] for key in _WHERE if key in kwargs}
    config = AutoConfig.from_pretrained(path, **where)
    said = getattr(config, "quantization_config", None) or {}
    if not isinstance(said, dict) or said.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{path}: not a spense checkpoint: its config.json has no quantization_config with "
            f"quant_method {QUANT_METHOD!r}"
        )
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    if fuse is not None:
        (neighbours.fuse if fuse else neighbours.unfuse)(model)
    return model
