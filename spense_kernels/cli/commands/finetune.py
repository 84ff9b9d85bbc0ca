# SPDX-License-Identifier: Apache-2.0
"""`spense finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spense_kernels.cli.guard import check_replaceable, need_space, new_directory
from spense_kernels.cli.options import (
    Checkpoint,
    Device,
    DType,
    Force,
    Json,
    Seed,
    check_device,
    parse_dtype,
    print_json,
)
from spense_kernels.errors import UserError


def finetune(
    checkpoint: Checkpoint,
    teacher: Annotated[
        str, typer.Option(help="The dense model it was pruned from (see `spense prune`).")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    calibration: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text files. Default: Python's documentation.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text to learn from.")] = 512,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a window, BOS included.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    minutes: Annotated[
        float | None,
        typer.Option(help="Time to spend, instead of --steps: the steps that fit are measured."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 8,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Windows a forward pass, to save memory.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    splice: Annotated[
        int, typer.Option(min=1, help="Put a window together from parts of that many.")
    ] = 1,
    interpolation: Annotated[
        float, typer.Option(help="The result lies there, from the pruned weights to the tuned.")
    ] = 1.0,
    layerwise: Annotated[
        bool,
        typer.Option(
            "--layerwise",
            help="Layer by layer, --steps each: for models of which one layer fits a device.",
        ),
    ] = False,
    seed: Seed = 0,
    work_dir: Annotated[
        Path | None, typer.Option(help="Keep the state here, to go on after a kill.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --work-dir has.")] = (
        False
    ),
    dtype: DType = "auto",
    device: Device = "cpu",
    force: Force = False,
    json: Json = False,
) -> None:
    """Bring a pruned model closer to the dense one: masks stay, weights learn its predictions.

    Several GPUs: `accelerate launch -m spense_kernels.cli finetune ...` with --device cuda.

    \b
    Examples:
      spense finetune ./pruned --teacher ./Llama-3.2-1B --out ./tuned --device cuda
      spense finetune ./pruned --teacher gemma-3-270m --out ./tuned --calibration a.txt --steps 100
      spense finetune ./pruned --teacher ./model --out ./tuned --work-dir ./work --resume
      spense finetune ./pruned --teacher ./model --out ./tuned --device cuda --minutes 2 --splice 4
      spense finetune ./pruned --teacher ./model --out ./tuned --device cuda --layerwise --steps 50
    """
    from spense_kernels.finetune import FinetuneConfig
    from spense_kernels.finetune.layerwise import unused_settings

    config = FinetuneConfig(
        steps=steps, minutes=minutes, batch=batch, micro_batch=micro_batch, lr=lr, seed=seed,
        splice=splice, interpolation=interpolation,
    )  # fmt: skip
    if layerwise:
        unused = unused_settings(config) + ([] if work_dir is None else ["work_dir"])
        if unused:
            raise UserError(f"finetune: --layerwise: expected no --{unused[0].replace('_', '-')}")
    device = check_device(device)
    check_replaceable(new_directory(out, force))
    if resume and work_dir is None:
        raise UserError("finetune: --resume needs --work-dir")
    if work_dir is not None:
        new_directory(work_dir, force=resume, option="--work-dir")
    from spense_kernels.cli import finetuning, pruning

    documents, text_name = pruning.documents(calibration)
    models = finetuning.load(checkpoint, teacher, parse_dtype(dtype))
    need_space(out, pruning.checkpoint_size(models.pruned.model))
    windows = pruning.windows(models.pruned.tokenizer, documents, samples, seq_len, seed)
    result = finetuning.run(
        models, windows, config, device, work_dir, out, force, text_name, layerwise
    )
    if json:
        print_json(result)
    else:
        typer.echo(finetuning.text(result))
