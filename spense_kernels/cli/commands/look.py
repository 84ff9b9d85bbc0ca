# SPDX-License-Identifier: Apache-2.0
"""`spense inspect`, `spense verify` and `spense env`."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from spense_kernels.cli.guard import FAILED
from spense_kernels.cli.options import Checkpoint, Json, print_json
from spense_kernels.errors import UserError


def inspect(
    checkpoint: Checkpoint,
    layers: Annotated[bool, typer.Option("--layers", help="One line for each layer.")] = False,
    json: Json = False,
) -> None:
    """What a checkpoint holds: layers, densities, bytes read per token, padding waste.

    Reads headers and small tensors only, so it is quick for any size. It checks little: see
    `spense verify`.

    \b
    Examples:
      spense inspect ./model-spense
      spense inspect ./model-spense --layers
      spense inspect ./model-spense --json | jq .totals
    """
    from spense_kernels.checkpoint import inspect_checkpoint

    found = inspect_checkpoint(checkpoint)
    found["totals"] = _totals(found)
    if json:
        print_json(found)
        return
    lines = _lines(found)
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        typer.echo(f"{name:<{width}}  {text}")
    if layers:
        typer.echo("")
        for x in found["layers"]:
            widths = ", ".join(f"{tiles} x {width}" for width, tiles in x["widths"].items())
            typer.echo(
                f"{x['name']:<44} {x['n']:>6} x {x['k']:<6} shards {x['k_shards']}  "
                f"dense {x['dense_fraction']:6.2%}  {x['packed_bytes'] / (x['n'] * x['k']):.3f} "
                f"B/weight  tiles x dense columns: {widths}"
            )


def _totals(found: dict) -> dict:
    layers = found["layers"]
    weights = sum(x["n"] * x["k"] for x in layers)
    dense = sum(x["n"] * x["k"] * x["dense_fraction"] for x in layers) / weights
    sums = ("checkpoint_bytes", "packed_bytes", "logical_bytes", "padding_waste", "bytes_per_token")
    return {
        "layers": len(layers),
        "weights": weights,
        "dense_fraction": dense,
        "kept_fraction": (1 + dense) / 2,
        "bf16_bytes": 2 * weights,
        **{name: sum(x[name] for x in layers) for name in sums},
    }


def _lines(found: dict) -> list[tuple[str, str]]:
    from spense_kernels.demo.report import readable_bytes

    total = found["totals"]
    lines = [
        ("model", f"{found['architecture']}, format version {found['version']}"),
        ("layers", f"{total['layers']} with {total['weights']:,} weights"),
        (
            "dense",
            f"{total['dense_fraction']:.2%} of the weights; {total['kept_fraction']:.2%} are kept",
        ),
        (
            "bytes per token",
            f"{readable_bytes(total['bytes_per_token'])}, of which "
            f"{readable_bytes(total['packed_bytes'])} packed weights = "
            f"{total['packed_bytes'] / total['weights']:.3f} a weight "
            f"(bf16: {readable_bytes(total['bf16_bytes'])})",
        ),
        (
            "padding waste",
            f"{readable_bytes(total['padding_waste'])}, "
            f"{total['padding_waste'] / total['packed_bytes']:.1%} of the packed bytes",
        ),
        (
            "stored",
            f"{readable_bytes(total['checkpoint_bytes'])} in these layers, "
            f"{readable_bytes(found['other_bytes'])} in all others",
        ),
        ("not converted", ", ".join(found["modules_to_not_convert"]) or "-"),
    ]
    for key, value in found["provenance"].items():
        text = value if isinstance(value, str) else json_module.dumps(value, ensure_ascii=False)
        lines.append((key, text if len(text) <= 200 else text[:197] + "..."))
    return lines


def verify(checkpoint: Checkpoint, json: Json = False) -> None:
    """Check every tensor of a checkpoint: shapes, dtypes, legal codes, permutations, checksums.

    Exits with 1 when something is wrong, and names it.

    \b
    Examples:
      spense verify ./model-spense
      spense verify ./model-spense --json
    """
    from spense_kernels.checkpoint import verify_checkpoint

    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such folder")
    report = verify_checkpoint(checkpoint)
    if json:
        print_json(report.as_dict())
    else:
        for problem in report.problems:
            typer.echo(f"spense: error: {problem}", err=True)
        for note in report.notes:
            typer.echo(f"note: {note}", err=True)
        if report.ok:
            typer.echo(f"{checkpoint}: {report.layers} layers, {report.tensors} tensors: all good")
    if not report.ok:
        raise typer.Exit(FAILED)


def env(json: Json = False) -> None:
    """What is installed and what would run here: versions, CPU, GPUs, built architectures.

    \b
    Examples:
      spense env
      spense env --json
    """
    from spense_kernels import env as facts

    found = facts.collect()
    if json:
        print_json(found)
    else:
        typer.echo(facts.report(found))
