# SPDX-License-Identifier: Apache-2.0
"""Model checkpoints: save, load, verify, inspect. The format is specified in docs/format.md."""

from spense_kernels.checkpoint.config import ModuleEntry, SpenseConfig
from spense_kernels.checkpoint.load import load_checkpoint
from spense_kernels.checkpoint.reader import CheckpointReader
from spense_kernels.checkpoint.save import save_checkpoint
from spense_kernels.checkpoint.verify import VerifyReport, inspect_checkpoint, verify_checkpoint

__all__ = [
    "CheckpointReader",
    "ModuleEntry",
    "SpenseConfig",
    "VerifyReport",
    "inspect_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "verify_checkpoint",
]
