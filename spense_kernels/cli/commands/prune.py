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
        Path | None, typer.Option(help="Folder of the new checkpoint (not with --dry-run).")
    ] = None,
    dense_fraction: Annotated[
        float, typer.Option(help="Share of weights that stays dense.")
    ] = 0.25,
    strategy: Annotated[
        str, typer.Option(help="uniform (one width a matrix) or staircase (one a 128-row tile).")
    ] = "uniform",
    method: Annotated[str, typer.Option(help="obs, wanda or magnitude.")] = "obs",
    k_shards: Annotated[
        int | None,
        typer.Option(
            help="Equal K shards for tensor parallelism. Default: 8 for K >= 4096, else 1."
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text files. Default: Python's documentation.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 64,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a window, BOS included.")] = 512,
    seed: Seed = 0,
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

    lm_head and embeddings stay as they are. With --calibration, all of the text is used.

    \b
    Examples:
      spense prune ./Llama-3.2-1B --out ./pruned
      spense prune gemma-3-270m --out ./pruned --dense-fraction 0.125 --strategy staircase
      spense prune ./model --out ./pruned --calibration a.txt b.txt --samples 128
      spense prune ./model --out ./pruned --work-dir ./work --resume
      spense prune ./model --dry-run --json
    """
    from spense_kernels.prune import PruneConfig

    config = PruneConfig(dense_fraction=dense_fraction, strategy=strategy, method=method, seed=seed)
    device = check_device(device)
    if not dry_run:
        if out is None:
            raise UserError("prune: --out is missing (or pass --dry-run)")
        check_replaceable(new_directory(out, force))
        _check_work_dir(work_dir, resume)
    from spense_kernels.cli import pruning

    documents, text_name = pruning.documents(calibration)
    loaded = pruning.load(source, parse_dtype(dtype))
    config = config.replace(k_shards=pruning.default_shards(loaded.model, k_shards))
    if dry_run:
        plan = pruning.planned(loaded, config)
        if json:
            print_json(plan)
        else:
            typer.echo(pruning.show_plan(plan))
        return
    need_space(out, pruning.checkpoint_size(loaded.model))
    windows = pruning.windows(loaded.tokenizer, documents, samples, seq_len, seed)
    result = pruning.run(loaded, windows, config, device, work_dir, out, force, text_name)
    if json:
        print_json(result)
    else:
        typer.echo(pruning.text(result))


def _check_work_dir(work_dir: Path | None, resume: bool) -> None:
    if resume and work_dir is None:
        raise UserError("prune: --resume needs --work-dir")
    if work_dir is not None:
        new_directory(work_dir, force=resume, option="--work-dir")
