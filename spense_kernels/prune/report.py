# SPDX-License-Identifier: Apache-2.0
"""What pruning did: per projection and for the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from spense_kernels.prune.config import PruneConfig


@dataclass
class ModuleReport:
    """One pruned projection.

    Attributes:
        name: full module name.
        n, k: rows and columns.
        relative_error: tr(E H E^T) / tr(W H W^T) on the calibration inputs, without damping.
        dense_width: dense columns of a K shard, one a 128-row tile.
        k_shards: shards of K.
        dense_fraction: logical share of dense weights.
        damping: relative damping that made H positive definite.
        dead_inputs: inputs that were zero in every calibration token.
        refit_damping: relative damping of H in refit and mask search; 0 without them.
    """

    name: str
    n: int
    k: int
    relative_error: float
    dense_width: list[int]
    k_shards: int
    dense_fraction: float
    damping: float
    dead_inputs: int = 0
    refit_damping: float = 0.0

    @property
    def logical_bytes(self) -> float:
        """FP8 bytes without padding: 1 a dense weight, 5/8 a sparse one, 4 a row for scales."""
        weights = self.n * self.k
        dense = self.dense_fraction * weights
        return dense + 0.625 * (weights - dense) + 4 * self.n


@dataclass
class PruneReport:
    """Result of prune_model.

    Attributes:
        config: settings used.
        modules: one entry per pruned projection, in model order.
        notes: repairs and warnings in plain words (raised damping, dead inputs, resumed layers).
        seconds: wall-clock time by stage.
        phases: the same by what is done in them (sweep, refit, ...), each without those inside it.
        calibration: sequences, tokens and a fingerprint of the calibration.
    """

    config: PruneConfig
    modules: list[ModuleReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    calibration: dict = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return sum(m.n * m.k for m in self.modules)

    @property
    def dense_fraction(self) -> float:
        """Logical share of dense weights over all pruned projections."""
        return sum(m.dense_fraction * m.n * m.k for m in self.modules) / max(1, self.weights)

    @property
    def mean_relative_error(self) -> float:
        return sum(m.relative_error for m in self.modules) / max(1, len(self.modules))

    @property
    def logical_bytes(self) -> float:
        return sum(m.logical_bytes for m in self.modules)

    def to_json(self) -> dict:
        """Plain values only."""
        return {
            "config": self.config.to_json(),
            "weights": self.weights,
            "dense_fraction": self.dense_fraction,
            "mean_relative_error": self.mean_relative_error,
            "logical_bytes": self.logical_bytes,
            "modules": [asdict(m) for m in self.modules],
            "notes": self.notes,
            "seconds": self.seconds,
            "phases": self.phases,
            "calibration": self.calibration,
        }
