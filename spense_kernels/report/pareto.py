# SPDX-License-Identifier: Apache-2.0
"""Prune at several dense fractions and measure each on held-out text."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spense_kernels import evaluate
from spense_kernels.cost import DECODE_BATCH, check_batch
from spense_kernels.demo.layers import layer_records, totals
from spense_kernels.errors import UserError
from spense_kernels.prune import (
    PruneConfig,
    PruneReport,
    Statistics,
    collect_statistics,
    prune_model,
    shallow_clone,
)
from spense_kernels.prune.statistics import Quiet
from spense_kernels.report.columns import dense_columns
from spense_kernels.report.sensitivity import hessian_bytes, predicted_losses
from spense_kernels.report.speed import group_names, speed_of_pruned

FRACTIONS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
MEMORY_SHARE = 0.5  # of the machine's memory that the Hessians of all layers may take


@dataclass
class Chosen:
    """The model pruned as asked for."""

    model: nn.Module
    report: PruneReport


def measure(
    model: nn.Module,
    calibration: Tensor,
    test: Tensor,
    config: PruneConfig,
    *,
    fractions: Sequence[float] = FRACTIONS,
    batch: int = DECODE_BATCH,
    device="cpu",
    work_dir=None,
    progress=None,
) -> tuple[dict, Chosen]:
    """Prune copies of the model at each dense fraction and at the config's own.

    Args:
        model: dense causal LM; moved to the device and otherwise left alone.
        calibration, test: int64 [S, L] token ids; the perplexity is that of `test`.
        config: settings of every prune; must have fp8.
        fractions: dense fractions in 0..1. 0 and 1 need not be among them: R's ends are plain
            SparseGPT 2:4 and the dense model, both without FP8, and are measured in any case.
        batch: tokens a decode step, of the modelled speed.
        work_dir: keeps finished layers of the prune at the config's own fraction.
        progress: as in prune_model.

    Returns the report as plain values, and the model pruned with the config itself.

    Raises UserError for a fraction outside 0..1, PruneError as prune_model does.

    Hessians of all layers are kept when they take less than half of the memory; if not, every
    prune collects its own and the report has no predicted losses.
    """
    check_batch(batch)
    wrong = [d for d in fractions if not 0.0 <= d <= 1.0]
    if wrong:
        raise UserError(f"report: dense fractions must be in 0..1, got {wrong[0]}")
    if not config.fp8:
        raise UserError("report: fp8: expected true, for float weights have no modelled speed")
    model.to(device)
    run = _Run(model, calibration, test, config, device, progress or Quiet())
    groups = group_names(model, config.skip)
    rows = [run.row("dense", "dense, no FP8", model)]
    low, _ = run.prune(PruneConfig.sparsegpt(skip=config.skip, seed=config.seed), None)
    rows.append(run.row("sparsegpt", "plain SparseGPT 2:4, no FP8", low))
    del low
    statistics = run.statistics()
    chosen = None
    for d in sorted({*fractions, config.dense_fraction}):
        asked = d == config.dense_fraction
        pruned, report = run.prune(
            config.replace(dense_fraction=d), statistics, work_dir if asked else None
        )
        row = run.row(f"{d:g}", f"{d:.1%} dense", pruned)
        row |= {
            "asked_fraction": d,
            "chosen": asked,
            "prune_seconds": round(sum(report.seconds.values()), 1),
            "speed": speed_of_pruned(pruned, groups, batch).to_json(),
        }
        rows.append(row)
        if asked:
            chosen = Chosen(pruned, report)
    add_recovery(rows)
    errors = {m.name: m.relative_error for m in chosen.report.modules}
    found = {
        "settings": config.to_json(),
        "calibration_windows": list(calibration.shape),
        "test_windows": list(test.shape),
        "totals": totals(chosen.model),
        "rows": rows,
        "layers": layer_records(chosen.model, errors),
        "columns": dense_columns(chosen.model, groups),
        "sensitivity": predicted_losses(model, calibration, statistics, config, device, progress),
    }
    return found, chosen


class _Run:
    def __init__(self, model, calibration, test, config, device, progress):
        self.model, self.calibration, self.test = model, calibration, test
        self.config, self.device, self.progress = config, device, progress

    def statistics(self) -> Statistics | None:
        """Of the settings' own weighting, or None when they would not fit."""
        sequential = self.config.calibration == "sequential"
        if sequential or hessian_bytes(self.model, self.config.skip) > MEMORY_SHARE * _memory():
            return None
        return collect_statistics(
            self.model, self.calibration, self.config.replace(dense_fraction=0.0),
            progress=self.progress, device=self.device,
        )  # fmt: skip

    def prune(self, config: PruneConfig, statistics, work_dir=None):
        pruned = shallow_clone(self.model)
        report = prune_model(
            pruned, self.calibration, config, statistics=statistics, progress=self.progress,
            work_dir=work_dir, device=self.device,
            layers_at_once=layers_at_once(statistics, self.device),
        )  # fmt: skip
        return pruned, report

    def row(self, key: str, label: str, model) -> dict:
        self.progress.start(f"evaluate, {label}", self.test.shape[0])
        found = evaluate.perplexity(model, self.test, progress=self.progress.advance)
        self.progress.finish()
        return {"key": key, "label": label, **found}


def add_recovery(rows: list[dict]) -> None:
    """Fill `r` and `r_stderr` of every row: 0 is plain SparseGPT 2:4, 1 the dense model.

    None where plain 2:4 is no worse than the dense model on this text. The error is first order,
    from the windows that all rows share; None for one window.
    """
    by_key = {row["key"]: row for row in rows}
    low, high = by_key["sparsegpt"], by_key["dense"]
    gap = low["nll"] - high["nll"]
    for row in rows:
        row["r"] = row["r_stderr"] = None
        if gap <= 0:
            continue
        row["r"] = r = (low["nll"] - row["nll"]) / gap
        triples = zip(low["window_nll"], high["window_nll"], row["window_nll"], strict=True)
        spread = [((a - c) - r * (a - b)) / gap for a, b, c in triples]
        if len(spread) > 1:
            mean = math.fsum(spread) / len(spread)
            variance = math.fsum((x - mean) ** 2 for x in spread) / (len(spread) - 1)
            row["r_stderr"] = math.sqrt(variance / len(spread))


def layers_at_once(statistics: Statistics | None, device) -> int:
    """How many layers to prune together: one on the CPU; on a GPU as many as surely fit."""
    if statistics is None or torch.device(device).type != "cuda":
        return 1
    layers = len(statistics.layers)
    free, _ = torch.cuda.mem_get_info(device)
    # A group takes up to 13 times its Hessians (down) or 15 times its weights (gate and up); those
    # weigh less than the Hessians of a layer.
    return max(1, min(layers, int(free / 16 / max(1, statistics.bytes / layers))))


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
