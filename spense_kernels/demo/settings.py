# SPDX-License-Identifier: Apache-2.0
"""What the demo does, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

# What two CPU cores can afford in minutes: without the search for better masks (it doubles the time
# of a prune), and few sequences for the backward pass.
PRUNER = {"admm_steps": 0, "sensitivity_sequences": 4}
PROMPTS = (
    "In economics, inflation is",
    "The first thing to know about a Python dictionary is that",
    "Once upon a time there was a little girl",
)


@dataclass(frozen=True)
class DemoSettings:
    """Settings of one demo run.

    Attributes:
        model: what load_dense takes.
        out: folder for report and checkpoint; must be absent or empty unless force.
        text: the user's text files; empty takes Python's documentation.
        dense_fraction: share of every layer's columns that stays dense in the hybrid model.
        calibration_windows, test_windows: windows of `length` tokens each.
        pruner: PruneConfig values that differ from its defaults.
        new_tokens: length of the generated continuations.
        prompts: their beginnings.
    """

    model: str = "gemma-3-270m"
    out: Path = Path("demo_out")
    text: tuple[Path, ...] = ()
    dense_fraction: float = 0.25
    seed: int = 0
    force: bool = False
    short: bool = False
    length: int = 512
    calibration_windows: int = 64
    test_windows: int = 16
    pruner: dict = field(default_factory=PRUNER.copy)
    new_tokens: int = 40
    prompts: tuple[str, ...] = field(default=PROMPTS)

    @classmethod
    def preset(cls, short: bool, **overrides) -> DemoSettings:
        """The full demo, or the same path with less text for continuous integration."""
        if short:
            small = {
                "calibration_windows": 8,
                "test_windows": 4,
                "pruner": {
                    **PRUNER,
                    "refit_steps": 4,
                    "search_rounds": 10,
                    "sensitivity_sequences": 2,
                },
                "new_tokens": 12,
                "prompts": PROMPTS[:2],
            }
            overrides = {**small, **overrides}
        return cls(short=short, **overrides)
