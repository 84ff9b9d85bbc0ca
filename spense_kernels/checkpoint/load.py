# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint folder into a transformers model with SpenseLinear layers."""

from __future__ import annotations

import os

import torch
from torch import nn

from spense_kernels import neighbours
from spense_kernels.checkpoint.reader import CheckpointReader
from spense_kernels.checkpoint.skeleton import build_skeleton, expected_tensors, set_tensor
from spense_kernels.linear import SpenseLinear


def load_checkpoint(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    fuse: bool | None = None,
) -> nn.Module:
    """The model in eval mode, no parameter asking for gradients.

    Args:
        path: folder that `save_checkpoint` wrote.
        device: where the model goes, one layer at a time.
        dtype: of the parts that are not converted (embeddings, norms); None as stored.
        fuse: make one GEMM of q, k, v and of gate, up, and let norms and activations quantise
            (`fuse_projections`, `fuse_neighbours`); None: on CUDA.

    Raises CheckpointError that names the tensor when one is missing, unexpected, of a wrong shape
    or dtype, damaged or illegal, or when config.json does not fit.
    """
    device = torch.device(device)
    reader = CheckpointReader(path)
    model = build_skeleton(reader.folder, reader.config, dtype)
    expected = expected_tensors(model)
    reader.check_names(set(expected))
    for name in reader.config.modules:
        model.set_submodule(name, SpenseLinear.from_hybrid(reader.layer(name), device))
        for short in reader.layer_tensors(reader.config.modules[name]):
            del expected[f"{name}.{short}"]
    for name, old in expected.items():
        new = reader.plain(name, old)
        wanted = dtype if dtype is not None and new.is_floating_point() else new.dtype
        # A copy, because what was read may be the file itself.
        set_tensor(model, old, new.to(device, wanted, copy=True))
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    _load_generation_config(model, reader)
    model.config.quantization_config = reader.config.to_dict()
    if device.type == "cuda" if fuse is None else fuse:
        neighbours.fuse(model)
    return model.eval().requires_grad_(False)


def _load_generation_config(model: nn.Module, reader: CheckpointReader) -> None:
    if not (reader.folder / "generation_config.json").exists():
        return
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig.from_pretrained(reader.folder, local_files_only=True)
