# SPDX-License-Identifier: Apache-2.0
"""The work behind `spense prune --report`."""

from __future__ import annotations

from pathlib import Path

from spense_kernels import evaluate
from spense_kernels.checkpoint import save_checkpoint
from spense_kernels.cli.options import corpus, enough
from spense_kernels.cli.pruning import note_target, result_of
from spense_kernels.demo.facts import provenance
from spense_kernels.models import LoadedModel
from spense_kernels.progress import Bars
from spense_kernels.prune import PruneConfig
from spense_kernels.report import measure, write_report
from spense_kernels.report.document import pareto_table


def texts(loaded: LoadedModel, paths, samples: int, tests: int, length: int, seed: int):
    """(calibration windows, test windows, name): the last quarter of each file is held out."""
    text = corpus(paths)
    pools = [evaluate.windows(loaded.tokenizer, part, length)
             for part in (text.calibration, text.test)]  # fmt: skip
    calibration = evaluate.pick(enough(pools[0], samples, "calibration", length), samples, seed)
    test = evaluate.pick(enough(pools[1], tests, "held-out text", length), tests)
    return calibration, test, text.name


def run(
    loaded: LoadedModel,
    windows: tuple,
    config: PruneConfig,
    device: str,
    work_dir: Path | None,
    folder: Path,
    out: Path | None,
    force: bool,
    *,
    fractions: list[float] | None,
    batch: int,
    target: float | None,
) -> dict:
    """Measure all fractions, write the report and, with `out`, the checkpoint."""
    calibration, test, name = windows
    options = {"fractions": fractions} if fractions else {}
    with Bars(indent="") as bars:
        found, chosen = measure(
            loaded.model, calibration, test, config, batch=batch, device=device,
            work_dir=work_dir, progress=bars, **options,
        )  # fmt: skip
    found = {"source": loaded.source, "text": name, **found}
    if target is not None:
        found["target_speedup"] = target
    paths = write_report(found, folder)
    text = {"name": name, "windows": list(calibration.shape)}
    if out is not None:
        save_checkpoint(
            chosen.model.to("cpu"), out, tokenizer=loaded.tokenizer,
            provenance=provenance(chosen.report, loaded.source, text), overwrite=force,
        )  # fmt: skip
    result = result_of(loaded, chosen.model, chosen.report, out, text)
    rows = [{k: v for k, v in row.items() if k != "window_nll"} for row in found["rows"]]
    result["speed"] = next(row["speed"] for row in rows if row.get("chosen"))
    note_target(result, target)
    return {**result, "report": {"files": [str(p) for p in paths], "rows": rows}}


def text(result: dict) -> str:
    """The result for a terminal."""
    report = result["report"]
    return f"{pareto_table(report['rows'])}\nwritten: {', '.join(report['files'])}"
