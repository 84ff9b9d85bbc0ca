# SPDX-License-Identifier: Apache-2.0
"""A light fine-tune of pruned models: masks stay, the dense model's predictions are the target."""

from spense_kernels.finetune.config import FinetuneConfig
from spense_kernels.finetune.layerwise import LayerwiseReport, reconstruct
from spense_kernels.finetune.student import (
    StudentLinear,
    finish_student,
    make_student,
    student_layers,
)
from spense_kernels.finetune.train import FinetuneReport, finetune

__all__ = [
    "FinetuneConfig",
    "FinetuneReport",
    "LayerwiseReport",
    "StudentLinear",
    "finetune",
    "finish_student",
    "make_student",
    "reconstruct",
    "student_layers",
]
