# SPDX-License-Identifier: Apache-2.0
"""The report as files: JSON, Markdown and, where matplotlib is installed, a picture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from spense_kernels.demo.report import plus_minus, readable_bytes, write_json
from spense_kernels.prune.store import write_text
from spense_kernels.report.plot import write_png

REPORT_VERSION = 1
WORST = 12  # projections that the Markdown names


def write_report(found: dict, folder: Path) -> list[Path]:
    """Write report.json, dense_columns.json, report.md and report.png; return their paths.

    Args:
        found: what `measure` returned, with "source" and "text" (names) added.
        folder: made when it is not there.

    Each file is written beside its place and renamed. No picture without matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"version": REPORT_VERSION, "groups": found["columns"]}
    main = {"version": REPORT_VERSION, **found}
    del main["columns"]
    paths = [folder / "report.json", folder / "dense_columns.json", folder / "report.md"]
    write_json(main, paths[0])
    write_text(paths[1], json.dumps(columns) + "\n")
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        paths.append(folder / "report.png")
        write_png(found, paths[3])
    write_text(paths[2], markdown(found, picture=drawn))
    return paths


def markdown(found: dict, picture: bool = False) -> str:
    """The report for a reader."""
    chosen = next(row for row in found["rows"] if row.get("chosen"))
    settings, speed = found["settings"], chosen["speed"]
    parts = [
        f"# {found['source']}: {chosen['asked_fraction']:.1%} dense",
        f"{settings['method']} / {settings['strategy']}; "
        f"{found['calibration_windows'][0]} calibration and {found['test_windows'][0]} test "
        f"windows of {found['test_windows'][1]} tokens of {found['text']}.",
    ]
    if "target_speedup" in found:
        parts.append(
            f"Asked for {found['target_speedup']:g} times the speed of dense FP8 at batch "
            f"{speed['batch']}; the model pruned so is modelled at {speed['speedup']:.3f}."
        )
    parts += ["## Quality against speed", pareto_table(found["rows"]), _speed_note(speed["batch"])]
    if picture:
        parts.append("![Quality against speed, sensitivity, dense columns](report.png)")
    parts += ["## Sensitivity", *_sensitivity(found), "## Dense columns", *_columns(found)]
    return "\n\n".join(parts) + "\n"


def pareto_table(rows: list[dict]) -> str:
    """One line a row: quality, and speed where the row has one."""
    lines = [
        "| | perplexity | R | weight bytes | modelled us a step | tokens/s | x dense FP8 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        recovery = "" if row["r"] is None else plus_minus(row["r"], row["r_stderr"], 3)
        cells = [row["label"], plus_minus(row["ppl"], row["ppl_stderr"]), recovery]
        if "speed" in row:
            speed = row["speed"]
            cells += [readable_bytes(speed["packed_bytes"]), f"{speed['us']:.1f}"]
            cells += [f"{speed['tokens_per_s']:.0f}", f"{speed['speedup']:.3f}"]
        else:
            cells += [""] * 4
        mark = "**" if row.get("chosen") else ""
        lines.append("| " + " | ".join(f"{mark}{c}{mark}" if c else "" for c in cells) + " |")
    return "\n".join(lines)


def _speed_note(batch: int) -> str:
    return (
        "R = 0 is plain SparseGPT 2:4 and R = 1 the dense model, both without FP8; ± is the "
        "standard error by window. The other rows have FP8 weights and activations. Speed is "
        f"modelled, not measured: a decode step of {batch} tokens through the pruned projections "
        "on an H100, q, k, v and gate, up fused, without attention, norms, embeddings and "
        "lm_head. Dense FP8 is the same kernel at 100 % dense."
    )


def _sensitivity(found: dict) -> list[str]:
    """Projections by the loss that they would add at 2:4."""
    errors = {layer["name"]: layer for layer in found["layers"]}
    predicted = found["sensitivity"]
    if not predicted:
        worst = sorted(errors.values(), key=lambda x: -x["rel_error"])[:WORST]
        lines = ["| projection | output error / energy | dense |", "| --- | --- | --- |"]
        lines += [
            f"| {x['name']} | {x['rel_error']:.4f} | {x['dense_fraction']:.1%} |" for x in worst
        ]
        return [
            "No predicted losses: they need method obs and the Hessians of all layers in memory. "
            "The largest output errors of the pruned model instead:",
            "\n".join(lines),
        ]
    worst = sorted(predicted, key=lambda x: -x["nats"][0])[:WORST]
    total = sum(x["nats"][0] for x in predicted)
    lines = [
        "| projection | nats at 2:4 | at 12.5 % | at 25 % | at 50 % | dense here | output error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for x in worst:
        layer = errors[x["name"]]
        shown = [f"{nats_at(x, share):.5f}" for share in (0.0, 0.125, 0.25, 0.5)]
        lines.append(
            f"| {x['name']} | {' | '.join(shown)} | {layer['dense_fraction']:.1%} | "
            f"{layer['rel_error']:.4f} |"
        )
    return [
        f"Loss that a projection alone is expected to add, in nats a token: the {len(worst)} "
        f"largest of {len(predicted)} ({sum(x['nats'][0] for x in worst) / total:.0%} of the sum "
        f"{total:.4f}). To second order, before refit and FP8: for ranking.",
        "\n".join(lines),
    ]


def nats_at(entry: dict, share: float) -> float:
    """Predicted nats at the reachable share nearest to this one."""
    place = min(range(len(entry["shares"])), key=lambda i: abs(entry["shares"][i] - share))
    return entry["nats"][place]


def _columns(found: dict) -> list[str]:
    kinds: dict[str, list[dict]] = {}
    for layer in found["layers"]:
        kinds.setdefault(layer["kind"], []).append(layer)
    lines = ["| | dense | least and most in a layer | widths in use |", "| --- | --- | --- | --- |"]
    for kind, layers in kinds.items():
        shares = [layer["dense_fraction"] for layer in layers]
        widths = sorted({w for layer in layers for w in layer["widths"]})
        mean = sum(s * x["n"] * x["k"] for s, x in zip(shares, layers, strict=True))
        mean /= sum(x["n"] * x["k"] for x in layers)
        lines.append(
            f"| {kind} | {mean:.1%} | {min(shares):.1%}, {max(shares):.1%} | "
            f"{', '.join(map(str, widths))} |"
        )
    return [
        "\n".join(lines),
        "Widths are dense columns of a K shard in a 128-row tile. Every column by its number is in "
        "dense_columns.json: `order` lists those that are dense in some tile, the longest-lived "
        "last; a tile of width w keeps the last w.",
    ]
