# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning of causal language models to the hybrid 2:4 sparse + dense format."""

from spense_kernels.prune.config import PruneConfig
from spense_kernels.prune.driver import prune_model
from spense_kernels.prune.install import PrunedModule, install, shallow_clone
from spense_kernels.prune.magnitude import MAGNITUDE, prune_magnitude
from spense_kernels.prune.report import ModuleReport, PruneReport
from spense_kernels.prune.statistics import Statistics, collect_statistics

__all__ = [
    "MAGNITUDE",
    "ModuleReport",
    "PruneConfig",
    "PruneReport",
    "PrunedModule",
    "Statistics",
    "collect_statistics",
    "install",
    "prune_magnitude",
    "prune_model",
    "shallow_clone",
]
