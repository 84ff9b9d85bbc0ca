# SPDX-License-Identifier: Apache-2.0
"""The quantization config that transformers sees: of a checkpoint, or what to prune to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin

from spense_kernels import checkpoint
from spense_kernels.checkpoint.config import QUANT_METHOD
from spense_kernels.errors import PruneError
from spense_kernels.prune import MAGNITUDE, PruneConfig


class SpenseConfig(QuantizationConfigMixin):
    """`quantization_config` of a model in transformers.

    Made by a user it says how to prune a dense model while it is loaded:
    `from_pretrained(dense, quantization_config=SpenseConfig(dense_fraction=0.25))`.
    Read from a checkpoint's config.json (or held by a pruned model) it is what docs/format.md
    describes, in `stored`; the other attributes mean nothing then.

    Attributes:
        dense_fraction: share of the weights that stays dense, 0..1.
        calibration: int64 [S, L] token ids; None prunes by magnitude, without data. Never saved.
        prune: all settings of the pruner; needs calibration. None takes its defaults with
            dense_fraction, k_shards and modules_to_not_convert from here.
        k_shards: K shards of row-parallel projections, for tensor parallelism.
        modules_to_not_convert: parts of names of linear layers to leave as they are. Layers outside
            the decoder layers, such as lm_head, always stay.
        fuse: make one GEMM of q, k, v and of gate, up, and let norms and activations quantise; None
            does it on CUDA.
        stored: checkpoint.SpenseConfig, or None before the model is pruned.

    Raises PruneError for settings that contradict each other.
    """

    def __init__(
        self,
        dense_fraction: float = 0.25,
        *,
        calibration: Tensor | None = None,
        prune: PruneConfig | None = None,
        k_shards: int = 1,
        modules_to_not_convert: Sequence[str] = (),
        fuse: bool | None = None,
    ):
        self.quant_method = QUANT_METHOD
        self.dense_fraction = dense_fraction
        self.calibration = calibration
        self.prune = prune
        self.k_shards = k_shards
        self.modules_to_not_convert = tuple(modules_to_not_convert or ())
        self.fuse = fuse
        self.stored: checkpoint.SpenseConfig | None = None
        if prune is not None and calibration is None:
            raise PruneError("SpenseConfig: prune needs calibration; magnitude takes no settings")
        self.prune_config()

    @classmethod
    def of_checkpoint(cls, stored: checkpoint.SpenseConfig, fuse: bool | None = None):
        """The config of a model that is pruned."""
        config = cls(fuse=fuse)
        config.stored = stored
        return config

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """Of config.json, checked strictly, or of a user's dict of the arguments above."""
        given = dict(config_dict)
        method = given.pop("quant_method", QUANT_METHOD)
        recipe = {"dense_fraction", "calibration", "prune", "k_shards", "fuse"}
        if method == QUANT_METHOD and recipe & given.keys():
            config = cls(**given)
        else:
            config = cls.of_checkpoint(checkpoint.SpenseConfig.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def prune_config(self) -> PruneConfig:
        """What the pruner is called with."""
        if self.prune is not None:
            if not self.prune.fp8:
                raise PruneError("SpenseConfig: prune.fp8 must be True: checkpoints hold FP8")
            return self.prune
        base = PruneConfig() if self.calibration is not None else MAGNITUDE
        return base.replace(
            dense_fraction=self.dense_fraction,
            k_shards=self.k_shards,
            skip=self.modules_to_not_convert,
        )

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json; plain JSON."""
        if self.stored is not None:
            return self.stored.to_dict()
        return {
            "quant_method": QUANT_METHOD,
            "dense_fraction": self.dense_fraction,
            "k_shards": self.k_shards,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "fuse": self.fuse,
        }

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict: transformers asks so when a loaded model's config is used again."""
        return getattr(self, key, default)

    def __deepcopy__(self, memo):
        # Shares the calibration, which nobody writes to; transformers copies configs often.
        made = copy.copy(self)
        made.stored = copy.deepcopy(self.stored, memo)
        return made
