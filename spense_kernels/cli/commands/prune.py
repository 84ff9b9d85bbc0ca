# SPDX-License-Identifier: Apache-2.0
"""`spense prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spense_kernels.cli.guard import check_replaceable, need_space, new_directory
from spense_kernels.cli.options import (
    Device,
    DType,
    Force,
    Json,
    Seed,
    Source,
    check_device,
    parse_dtype,
    print_json,
)
from spense_kernels.errors import UserError


def prune(
    source: Source,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the new checkpoint (may be left out with --report)."),
    ] = None,
    dense_fraction: Annotated[
        float | None, typer.Option(help="Share of weights that stays dense. Default: 0.25.")
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(
            help="Instead: the most that stays dense when a modelled decode step of the pruned "
            "layers must be this many times as fast as dense FP8."
        ),
    ] = None,
    decode_batch: Annotated[
        int, typer.Option(min=1, help="Tokens a decode step, for modelled speeds.")
    ] = 16,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="uniform (one width a matrix) or staircase (one a 128-row tile). Default: uniform."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="obs, wanda or magnitude. Default: obs.")
    ] = None,
    k_shards: Annotated[
        int | None,
        typer.Option(
            help="Equal K shards for tensor parallelism. Default: 8 for K >= 4096, else 1."
        ),
    ] = None,
    admm_steps: Annotated[
        int | None,
        typer.Option(help="Steps of the search for better masks; 0 is the fastest. Default: 30."),
    ] = None,
    search_rounds: Annotated[
        int | None, typer.Option(help="Rounds of the search for a column order. Default: 50.")
    ] = None,
    refit_steps: Annotated[
        int | None, typer.Option(help="Steps that refit the kept weights. Default: 12.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Parts of names of layers to leave as they are.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting of PruneConfig as NAME=VALUE; lists a,b."),
    ] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text files. Default: Python's documentation.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 64,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a window, BOS included.")] = 512,
    seed: Seed = 0,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder for quality against speed, sensitivity and dense columns."),
    ] = None,
    report_fractions: Annotated[
        list[float] | None,
        typer.Option(help="Dense fractions of the report. Default: 0 .125 .25 .5 .75 1."),
    ] = None,
    report_windows: Annotated[
        int, typer.Option(min=1, help="Held-out windows that the report measures.")
    ] = 16,
    work_dir: Annotated[
        Path | None, typer.Option(help="Keep finished layers here, to go on after a kill.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --work-dir has.")] = (
        False
    ),
    dtype: DType = "auto",
    device: Device = "cpu",
    force: Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be pruned; write nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Prune a model's linear layers to the hybrid format and save a checkpoint.

    lm_head and embeddings stay as they are. With --calibration, all of the text is used; with
    --report, the last quarter of each file is held out and measured.

    \b
    Examples:
      spense prune ./Llama-3.2-1B --out ./pruned
      spense prune gemma-3-270m --out ./pruned --dense-fraction 0.125 --strategy staircase
      spense prune ./model --out ./pruned --target-speedup 1.3 --decode-batch 16
      spense prune ./model --report ./report --report-fractions 0 0.25 0.5
      spense prune ./model --out ./pruned --calibration a.txt b.txt --samples 128
      spense prune ./model --out ./pruned --admm-steps 0 --set damping=0.02 --set widths=0,0.25,1
      spense prune ./model --out ./pruned --work-dir ./work --resume
      spense prune ./model --dry-run --json
    """
    from spense_kernels.cli.settings import make_config

    options = {"dense_fraction": dense_fraction, "strategy": strategy, "method": method}
    options |= {"admm_steps": admm_steps, "search_rounds": search_rounds}
    options |= {"refit_steps": refit_steps, "skip": tuple(skip) if skip else None, "seed": seed}
    config = make_config({**options, "k_shards": k_shards}, set_ or [])
    if target_speedup is not None and "dense_fraction" in _given(options, set_):
        raise UserError("prune: --target-speedup chooses the dense fraction; give one of the two")
    if report is None and report_fractions:
        raise UserError("prune: --report-fractions needs --report")
    device = check_device(device)
    if not dry_run:
        _check_folders(out, report, work_dir, resume, force)
    from spense_kernels.cli import pruning, reporting
    from spense_kernels.report.speed import spend

    reads = None if report else pruning.documents(calibration)
    loaded = pruning.load(source, parse_dtype(dtype))
    if "k_shards" not in _given({"k_shards": k_shards}, set_):
        config = config.replace(k_shards=pruning.default_shards(loaded.model, None))
    if target_speedup is not None:
        config = spend(loaded.model, config, target_speedup, decode_batch)
    if dry_run:
        plan = pruning.planned(loaded, config, decode_batch)
        if json:
            print_json(plan)
        else:
            typer.echo(pruning.show_plan(plan))
        return
    if out is not None:
        need_space(out, pruning.checkpoint_size(loaded.model))
    if report is None:
        windows = pruning.windows(loaded.tokenizer, reads[0], samples, seq_len, seed)
        result = pruning.run(
            loaded, windows, config, device, work_dir, out, force, reads[1], decode_batch,
            target_speedup,
        )  # fmt: skip
    else:
        windows = reporting.texts(loaded, calibration, samples, report_windows, seq_len, seed)
        result = reporting.run(
            loaded, windows, config, device, work_dir, report, out, force,
            fractions=report_fractions, batch=decode_batch, target=target_speedup,
        )  # fmt: skip
    if json:
        print_json(result)
    else:
        typer.echo(pruning.text(result) if report is None else reporting.text(result))


def _given(options: dict, changes: list[str] | None) -> set[str]:
    """Names of settings that the user named."""
    words = {word.partition("=")[0] for word in changes or []}
    return words | {name for name, value in options.items() if value is not None}


def _check_folders(out, report, work_dir, resume: bool, force: bool) -> None:
    if out is None and report is None:
        raise UserError("prune: --out is missing (or pass --report or --dry-run)")
    if out is not None:
        check_replaceable(new_directory(out, force))
    if report is not None:
        new_directory(report, force, option="--report")
    if resume and work_dir is None:
        raise UserError("prune: --resume needs --work-dir")
    if work_dir is not None:
        new_directory(work_dir, force=resume, option="--work-dir")
