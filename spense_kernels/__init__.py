# SPDX-License-Identifier: Apache-2.0
"""Hybrid 2:4 sparse + dense FP8 GEMM for LLM inference.

Importing the package registers the ops `torch.ops.spense.*` and, when transformers is (or gets)
loaded, makes its from_pretrained read our checkpoints. The names below load on first use.
"""

from __future__ import annotations

import importlib

from spense_kernels import _load, _register, ops

# Of the build, so that a folder of built files works without being installed.
__version__ = _load.build_info()["version"]

_HOMES = {
    "SpenseConfig": "hf",
    "HybridWeight": "format",
    "PackedWeight": "format",
    "Split": "format",
    "SpenseLinear": "linear",
    "fuse_neighbours": "neighbours",
    "fuse_projections": "fusion",
    "load": "hf",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "unfuse_neighbours": "neighbours",
    "unfuse_projections": "fusion",
    "verify_checkpoint": "checkpoint",
    "PruneConfig": "prune",
    "prune_model": "prune",
}

__all__ = ["__version__", "ops", *_HOMES]

_register.install()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
