# SPDX-License-Identifier: Apache-2.0
"""`spense demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spense_kernels.cli.guard import check_replaceable, need_space, new_directory
from spense_kernels.cli.options import Force, Json, Seed
from spense_kernels.errors import UserError

_FIRST_TRY = "demo_out"
NEEDED_BYTES = 700 << 20  # the checkpoint of the default model, with room


def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the report. Default: demo_out, or demo_out-2, -3, ..."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Your own UTF-8 text files; a quarter of each is held out."),
    ] = None,
    dense_fraction: Annotated[float, typer.Option(help="Share of columns that stay dense.")] = 0.25,
    short: Annotated[bool, typer.Option("--short", help="The same path with less text.")] = False,
    model: Annotated[str, typer.Option(help="A dense model, as in `spense prune`.")] = (
        "gemma-3-270m"
    ),
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Prune a real pretrained model, reload it in a new process, compare, write a report.

    Takes Gemma-3-270m from its PyPI packages (Gemma terms of use apply) and Python's own
    documentation as text: nothing is downloaded. About 8 minutes on 2 cores, under 6 GB.

    \b
    Examples:
      spense demo
      spense demo --text book.txt letters.txt --out my_report
      spense demo --short --json
    """
    if not 0.0 <= dense_fraction <= 1.0:
        raise UserError(f"--dense-fraction: expected 0 to 1, got {dense_fraction}")
    folder = _fresh_folder() if out is None else new_directory(out, force)
    check_replaceable(folder / "checkpoint")
    need_space(folder, NEEDED_BYTES)

    from spense_kernels.demo.report import summary
    from spense_kernels.demo.run import run_demo
    from spense_kernels.demo.settings import DemoSettings

    settings = DemoSettings.preset(
        short,
        model=model,
        out=folder,
        text=tuple(text or ()),
        dense_fraction=dense_fraction,
        seed=seed,
        force=force,
    )
    report = run_demo(settings)
    if json:
        from spense_kernels.demo.report import to_text

        typer.echo(to_text(report), nl=False)
    else:
        typer.echo("\n" + summary(report))
    for name in ("report.json", "report.png", "checkpoint"):
        typer.echo(f"{name:<12} {folder / name}", err=json)


def _fresh_folder() -> Path:
    """demo_out, or the first of demo_out-2, demo_out-3, ... that holds nothing yet."""
    number = 1
    while True:
        folder = Path(_FIRST_TRY if number == 1 else f"{_FIRST_TRY}-{number}")
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return new_directory(folder, force=False)
        number += 1
