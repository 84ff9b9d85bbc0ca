# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from spense_kernels.errors import UserError

Source = Annotated[
    str,
    typer.Argument(help="A Hugging Face directory, a .gguf file, or the name gemma-3-270m."),
]
AnySource = Annotated[
    str,
    typer.Argument(
        help="A spense checkpoint, a Hugging Face directory, a .gguf file, or gemma-3-270m."
    ),
]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint folder that `spense prune` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
DType = Annotated[
    str, typer.Option(help="bfloat16, float32 or auto (bfloat16 where the CPU has it).")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]


def parse_dtype(name: str):
    """torch dtype of a --dtype value; None for auto."""
    import torch

    known = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in known:
        raise UserError(f"--dtype: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def check_device(name: str) -> str:
    """The device name, or UserError when it does not exist here."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return name


def print_json(value: dict) -> None:
    typer.echo(json_module.dumps(value, indent=2, ensure_ascii=False))


def corpus(paths: list[Path] | None):
    """The user's files, or Python's documentation when there are none."""
    from spense_kernels import evaluate

    return evaluate.files(paths) if paths else evaluate.python_docs()


def enough(windows, count: int, what: str, length: int):
    """`windows`, or UserError when the text gave none; says so when it gave fewer than asked."""
    if windows.shape[0] == 0:
        raise UserError(f"{what}: the text is shorter than one window of {length} tokens")
    if windows.shape[0] < count:
        typer.echo(
            f"spense: note: {what}: the text gives {windows.shape[0]} windows of {length} tokens, "
            f"{count} were asked for",
            err=True,
        )
    return windows
