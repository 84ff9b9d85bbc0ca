# SPDX-License-Identifier: Apache-2.0
"""Load causal language models: Hugging Face directories, GGUF files, spense checkpoints."""

from spense_kernels.models.load import (
    LoadedModel,
    auto_dtype,
    is_spense_checkpoint,
    load_any,
    load_dense,
    need,
)

__all__ = ["LoadedModel", "auto_dtype", "is_spense_checkpoint", "load_any", "load_dense", "need"]
