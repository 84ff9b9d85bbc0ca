# SPDX-License-Identifier: Apache-2.0
"""Settings of the pruner, checked when they are made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from spense_kernels.errors import PruneError

_CHOICES = {
    "method": ("obs", "wanda", "magnitude"),
    "strategy": ("uniform", "staircase"),
    "score": ("wanda", "activation", "obs", "magnitude", "random"),
    "permutation": ("search", "snake", "none"),
    "mask": ("pair", "diagonal"),
    "dense_order": ("last", "first"),
    "token_weighting": ("norm", "none"),
    "calibration": ("static", "sequential"),
    "budget": ("model", "matrix"),
    "curves": ("sweep", "refit"),
    "sensitivity_labels": ("model", "text"),
}


@dataclass(frozen=True)
class PruneConfig:
    """How to prune. Defaults carry their evidence in docs/pruning.md.

    Attributes:
        dense_fraction: share of the weights that stays dense, 0..1. 1 is plain FP8 quantisation.
        method: "obs" compensates second order; "wanda" and "magnitude" only mask (baselines).
        strategy: "uniform" keeps the same columns dense in every row of a matrix; "staircase"
            chooses one dense width per 128-row tile from `shares`.
        score: what ranks columns: "wanda" = H_jj sum_i W_ij^2, "activation" = H_jj,
            "obs" = sum_i W_ij^2 / [H^-1]_jj, "magnitude" = sum_i W_ij^2, "random".
        permutation: order of the 2:4 columns: "search" = snake, then local search over groups.
        search_rounds: rounds of that search; each tries one partner for every group.
        search_rows: rows that the search looks at, those with the largest saliency.
        mask: "pair" drops the exactly best pair of each group of four, "diagonal" ignores the
            coupling of the two (SparseGPT).
        correct: prune layer by layer: inputs of the model pruned so far (FP8 activations with fp8),
            aimed at the dense model's outputs. Order and widths of the columns are those of a prune
            without; masks, refit and FP8 are not. The report's errors are then against what each
            projection was aimed at. Of the decoder layers; needs method "obs" and calibration
            "static"; changes nothing at dense_fraction 1. Layers are then pruned one by one.
        admm_steps: steps of the search for a better mask after the sweep; 0 for none. About
            doubles the time of a prune on a CPU.
        refit_steps: conjugate-gradient steps on the kept weights after the sweep; 0 for none.
        curves: staircase only: what a tile loses at a width, "sweep" = after the sweep, "refit" =
            after order search, mask search and refit (about one more prune a width).
        curve_refit_steps: staircase with curves "sweep": refit steps before a tile's loss at a
            width is taken.
        damping: added to diag(H), relative to its mean.
        dense_order: "last" lets the error of the 2:4 part flow into the dense columns.
        token_weighting: "norm" weights tokens by 1 / mean(y^2) where y goes straight into an
            RMSNorm, "none" counts every token alike.
        calibration: "static" takes activations of the dense model, "sequential" those of the
            model pruned so far.
        fp8: round to FP8 per output channel; False leaves nn.Linear with float weights.
        fp8_feedback: spread the rounding error over the columns that follow.
        k_shards: equal K shards, for tensor parallelism, of the projections that `shard_modules`
            names; one whose K is no multiple of 16 * k_shards keeps 1.
        shard_modules: ends of the names of row-parallel projections.
        widths: shares of a shard that a staircase may keep dense in a tile; empty for those that
            suit the dense fraction (see `shares`).
        budget: "model" spends the staircase's dense weights over all layers at once, "matrix"
            gives every group of projections the same share.
        sort_rows: staircase only: sort the rows of gate and up alike by sensitivity.
        sinks: weigh the first token of every sequence by how much the loss reacts to it (attention
            uses it as a sink); takes a backward pass over `sensitivity_sequences`.
        gradient_share: share of H whose tokens are weighted by their gradients, of the sequences
            of the backward pass (as many as the calibration has, if it is 1); needs statistics.
        gradient_power: a token's weight there is (mean over outputs of g^2) to this power.
        shrinkage: share by which H's off-diagonal entries shrink.
        sensitivity_sequences: calibration sequences for the backward pass.
        sensitivity_stride: the loss for it takes every so many positions.
        sensitivity_batch: sequences at a time in it.
        sensitivity_labels: "model" draws the next tokens of that loss from the model's
            predictions, "text" takes the text's.
        modules: extra nn.Linear names to prune beside those of the decoder layers (lm_head).
        skip: parts of names of nn.Linear to leave as they are.
        seed: for the group pairings of the search and for random columns.
    """

    dense_fraction: float = 0.25
    method: str = "obs"
    strategy: str = "uniform"
    score: str = "wanda"
    permutation: str = "search"
    search_rounds: int = 50
    search_rows: int = 512
    mask: str = "pair"
    refit_steps: int = 12
    curve_refit_steps: int = 0
    damping: float = 0.01
    dense_order: str = "last"
    token_weighting: str = "norm"
    calibration: str = "static"
    fp8: bool = True
    fp8_feedback: bool = True
    k_shards: int = 1
    shard_modules: tuple[str, ...] = ("o_proj", "down_proj", "out_proj", "fc2")
    widths: tuple[float, ...] = ()
    budget: str = "model"
    curves: str = "sweep"
    sort_rows: bool = True
    sensitivity_sequences: int = 16
    sensitivity_stride: int = 4
    sensitivity_batch: int = 1
    sensitivity_labels: str = "model"
    sinks: bool = True
    gradient_share: float = 0.0
    gradient_power: float = 0.5
    shrinkage: float = 0.0
    admm_steps: int = 30
    correct: bool = False
    modules: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise PruneError(f"PruneConfig: {name} must be one of {allowed}, got {value!r}")
        if not 0.0 <= self.dense_fraction <= 1.0:
            raise PruneError(
                f"PruneConfig: dense_fraction must be in 0..1, got {self.dense_fraction}"
            )
        for name, low in (
            ("search_rounds", 0), ("search_rows", 1), ("refit_steps", 0), ("curve_refit_steps", 0),
            ("seed", 0),
        ):  # fmt: skip
            self._integer(name, low)
        self._integer("k_shards", 1)
        self._integer("sensitivity_sequences", 1)
        self._integer("sensitivity_stride", 1)
        self._integer("sensitivity_batch", 1)
        self._integer("admm_steps", 0)
        for name in ("gradient_share", "shrinkage"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise PruneError(f"PruneConfig: {name} must be in 0..1, got {getattr(self, name)}")
        for name in ("damping", "gradient_power"):
            if not getattr(self, name) > 0:
                raise PruneError(f"PruneConfig: {name} must be above 0, got {getattr(self, name)}")
        for name in ("widths", "modules", "skip", "shard_modules"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if any(not isinstance(w, (int, float)) or not 0.0 <= w <= 1.0 for w in self.widths):
            raise PruneError(f"PruneConfig: widths must be shares in 0..1, got {self.widths}")
        if self.strategy == "staircase" and self.method != "obs":
            raise PruneError("PruneConfig: strategy 'staircase' needs method 'obs'")

        if not isinstance(self.correct, bool):
            raise PruneError(f"PruneConfig: correct must be True or False, got {self.correct!r}")
        if self.correct and self.method != "obs":
            raise PruneError(f"PruneConfig: correct needs method 'obs', got {self.method!r}")
        if self.correct and self.calibration != "static":
            raise PruneError(
                f"PruneConfig: correct needs calibration 'static', got {self.calibration!r}"
            )

    def _integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise PruneError(f"PruneConfig: {name} must be an int >= {low}, got {value!r}")

    @classmethod
    def sparsegpt(cls, **overrides) -> PruneConfig:
        """Plain one-shot SparseGPT 2:4 without FP8: R = 0 of every quality figure."""
        plain = {"dense_fraction": 0.0, "permutation": "none", "mask": "diagonal", "refit_steps": 0}
        plain |= {"token_weighting": "none", "sinks": False, "shrinkage": 0.0, "admm_steps": 0}
        return cls(**{**plain, "fp8": False, **overrides})

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass is part of the calibration."""
        used = self.sinks or self.gradient_share > 0.0 or self.strategy == "staircase"
        return used and self.method == "obs" and self.dense_fraction < 1.0

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares that a tile may keep dense: `widths` with 0 and 1, or a list by the fraction.

        Where half of a model stays dense, most tiles want something between 1/2 and 1.
        """
        fitting = (0.25, 0.5, 0.75) if self.dense_fraction >= 0.375 else (0.25, 0.5)
        return tuple(sorted({0.0, 1.0, *(self.widths or fitting)}))

    def replace(self, **changes) -> PruneConfig:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    def fingerprint(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def curves_key(self) -> str:
        """Equal for settings that differ in nothing but the dense fraction and `correct` and use
        one list of shares: their row losses are the same."""
        same = self.replace(dense_fraction=0.0, widths=self.shares, correct=False)
        return same.fingerprint()
