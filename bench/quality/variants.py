# SPDX-License-Identifier: Apache-2.0
"""Rows of the quality table: name -> settings. A row shows what one idea moves."""

from __future__ import annotations

from spense_kernels.prune import PruneConfig

PLAIN = {
    "permutation": "none",
    "mask": "diagonal",
    "refit_steps": 0,
    "token_weighting": "none",
    "fp8": False,
    "sinks": False,
    "admm_steps": 0,
}
_BEST = {"search_rounds": 150, "search_rows": 4096, "refit_steps": 20}
_WITHOUT = {"sinks": False, "admm_steps": 0}


def _plain(**changes) -> PruneConfig:
    return PruneConfig(**{**PLAIN, **changes})


def _best(**changes) -> PruneConfig:
    return PruneConfig(**{**_BEST, **changes})


# R = 0 is "sparsegpt 2:4", R = 1 "dense" (no settings: the model as it is).
VARIANTS: dict[str, PruneConfig | None] = {
    "dense": None,
    "sparsegpt 2:4": PruneConfig.sparsegpt(),
    "dense fp8": _best(dense_fraction=1.0),
    "uniform 25 %": _best(),
    "uniform 25 %, without fp8": _best(fp8=False),
    "staircase 25 %": _best(strategy="staircase"),
    "uniform 12.5 %": _best(dense_fraction=0.125),
    "uniform 50 %": _best(dense_fraction=0.5),
    "2:4": _best(dense_fraction=0.0),
    "staircase 12.5 %": _best(strategy="staircase", dense_fraction=0.125),
    "staircase 50 %": _best(strategy="staircase", dense_fraction=0.5),
    "uniform 25 %, k_shards 2": _best(k_shards=2),
    "magnitude 2:4": _plain(dense_fraction=0.0, method="magnitude"),
    "wanda 2:4": _plain(dense_fraction=0.0, method="wanda"),
    "wanda 25 %": _plain(method="wanda"),
    # One idea at a time, from SparseGPT with dense columns up to "uniform 25 %".
    "a0 sparsegpt + dense columns 25 %": _plain(),
    "a1 + token weighting": _plain(token_weighting="norm"),
    "a2 + exact pair": _plain(token_weighting="norm", mask="pair"),
    "a3 + snake": _plain(token_weighting="norm", mask="pair", permutation="snake"),
    "a4 + searched order": _best(refit_steps=0, fp8=False, **_WITHOUT),
    "a5 + refit, 2 steps": _best(refit_steps=2, fp8=False, **_WITHOUT),
    "a6 + refit, 20 steps": _best(fp8=False, **_WITHOUT),
    "a7 + sinks": _best(fp8=False, admm_steps=0),
    "a8 + mask search": _best(fp8=False),
    "fp8 rounded at the end 25 %": _best(fp8_feedback=False),
    # Controls.
    "random columns 25 %": _plain(score="random"),
    "magnitude columns 25 %": _plain(score="magnitude"),
    "activation columns 25 %": _plain(score="activation"),
    "obs columns 25 %": _plain(score="obs"),
    "dense first 25 %": _plain(dense_order="first"),
    "sequential calibration 25 %": _best(calibration="sequential"),
    # Cost: what the demo can afford.
    "uniform 25 %, defaults": PruneConfig(),
    "uniform 25 %, search 20 x 256, refit 5": PruneConfig(
        search_rounds=20, search_rows=256, refit_steps=5
    ),
}
