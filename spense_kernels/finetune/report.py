# SPDX-License-Identifier: Apache-2.0
"""What the reports of both ways to fine-tune have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from spense_kernels.finetune.config import FinetuneConfig


@dataclass
class Report:
    """Settings, and what they led to; a subclass says what its losses are.

    Attributes:
        config: settings used.
        losses: in the order of the run.
        seconds: wall-clock time.
        tokens: token positions trained on.
    """

    config: FinetuneConfig
    losses: list = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    def to_json(self) -> dict:
        return {**vars(self), "config": self.config.to_json()}
