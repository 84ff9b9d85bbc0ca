# SPDX-License-Identifier: Apache-2.0
"""What targets.py, cold.py, baselines.py, second_family.py and layer_cost.py found, for docs."""

from __future__ import annotations

import json
import re
from pathlib import Path

FILES = {
    "targets": "quality_targets.json",
    "baselines": "quality_baselines.json",
    "second": "quality_second_27m.json",
    "second-small": "quality_second.json",
    "layer": "quality_layer.json",
    "cold": "quality_cold.json",
}
# Rows of targets.py: the same with the seed left out are one line.
_SEED = re.compile(r", seed \d+$")
MISSING = "No results committed yet."


def hybrid_bytes(dense_fraction: float) -> float:
    """FP8 bytes a weight without padding."""
    return dense_fraction + 0.625 * (1 - dense_fraction)


def table(rows: dict) -> str:
    """One line a row, in the order of the file."""
    base = rows["dense"]["test"]["nll"]
    lines = [
        "| row | byte a weight | FP8 | PPL | nats above dense | R | outside R |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        test = row["test"]
        fp8 = "W, A" if row.get("config", {}).get("fp8") else ""
        lines.append(
            f"| {name} | {size_of(name, row)} | {fp8} | {test['ppl']:.2f} | "
            f"{test['nll'] - base:+.4f} | {test['r']:.3f} ± {test['r_stderr']:.3f} | "
            f"{row['outside']['r']:.3f} |"
        )
    return "\n".join(lines)


def size_of(name: str, row: dict) -> str:
    """As stored in FP8, whether or not the row rounds to it; of 6:8 in both forms."""
    if "bytes_a_weight" in row:
        return " or ".join(f"{value:.3f}" for value in row["bytes_a_weight"].values())
    return "2 (bf16)" if name == "dense" else f"{hybrid_bytes(row['dense_fraction']):.3f}"


def targets(result: dict) -> str:
    """Means over the calibration seeds."""
    rows, setup = result["rows"], result["setup"]
    found: dict[str, list[dict]] = {}
    for name, row in rows.items():
        found.setdefault(_SEED.sub("", name), []).append(row)
    lines = [
        "| row | seeds | validation R | test R | least, most | outside R | s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, same in found.items():
        by_part = {part: [row[part]["r"] for row in same]
                   for part in ("validation", "test", "outside")}  # fmt: skip
        mean = {part: sum(values) / len(values) for part, values in by_part.items()}
        tests = by_part["test"]
        seconds = [row.get("tune_seconds", row.get("prune_seconds")) for row in same]
        taken = f"{max(seconds):.0f}" if None not in seconds else ""
        spread = f"{min(tests):.3f}, {max(tests):.3f}" if len(tests) > 1 else ""
        lines.append(
            f"| {name} | {len(same)} | {mean['validation']:.3f} | {mean['test']:.3f} | {spread} | "
            f"{mean['outside']:.3f} | {taken} |"
        )
    return "\n\n".join([
        "\n".join(lines),
        f"{setup['model']}, {setup['calibration_windows']} calibration, "
        f"{setup['validation_windows']} validation and {setup['test_windows']} test windows, "
        f"{result['machine']['device']}. Seconds are the longest prune or fine-tune of the line; a "
        "fine-tune's text holds the validation windows.",
    ])  # fmt: skip


def baselines(result: dict) -> str:
    setup = result["setup"]
    return "\n\n".join([
        table(result["rows"]),
        f"{setup['model']}, {setup['calibration_windows']} calibration and "
        f"{setup['test_windows']} test windows, {result['machine']['device']}. Bytes are those of "
        "FP8 storage, for rows without FP8 too.",
    ])  # fmt: skip


def second(result: dict) -> str:
    setup, training = result["setup"], result["training"]
    return "\n\n".join([
        table(result["rows"]),
        f"{setup['model']} on {setup['text']}: {training['text_tokens']:,} tokens, "
        f"{training['steps']} steps of {setup['size']['batch']} windows of "
        f"{setup['window_tokens']}, {training['seconds']:.0f} s, {result['machine']['device']}. "
        f"{setup['size']['calibration']} calibration and {setup['test_windows']} test windows.",
    ])  # fmt: skip


def layer(result: dict) -> str:
    """One sentence: what a layer of a large model costs."""
    sequences, length = result["tokens"]
    seconds, asked = result["prune_seconds"], result["targets"]
    return (
        f"{result['model'].capitalize()}, {sequences} x {length} calibration tokens, at "
        f"{result['dense_fraction']:.0%} dense: {result['seconds']:.1f} s (asked: "
        f"{asked['seconds']:.0f}), of them statistics {result['statistics_seconds']:.1f}, plan "
        f"{seconds['plan']:.1f} and prune {seconds['prune']:.1f}; {result['model_minutes']:.0f} "
        f"minutes for 64 such layers; at most {result['peak_device_bytes'] / 1e9:.0f} GB "
        f"on the card (asked: {asked['peak_device_bytes'] / 1e9:.0f}) and "
        f"{result['peak_host_bytes'] / 1e9:.0f} GB on the host. {result['machine']['device']}, "
        f"commit {result['commit'][:7]}, `python bench/quality/layer_cost.py`."
    )


def cold(result: dict) -> str:
    """One sentence: a process's first prune and its second."""
    first, second = (result["seconds"][name] for name in ("first", "second"))
    return (
        f"Statistics and a prune with `correct` at {result['dense_fraction']:.0%} dense, "
        f"{result['setup']['calibration_windows']} windows: {first['all']:.1f} s for the first of "
        f"a process (asked: 20), of them statistics {first['collect']:.1f}; {second['all']:.1f} s "
        f"for the second (statistics {second['collect']:.1f}). Loading the model is not in it. "
        f"{result['machine']['device']}, commit {result['commit']}, `python bench/quality/cold.py "
        f"--device cuda --calibration 320 --validation 48`."
    )


def parts(folder: Path) -> dict[str, str]:
    """Text by marker; says so where a result file is not there."""
    found = {}
    kinds = {
        "targets": targets, "baselines": baselines, "second": second, "second-small": second,
        "layer": layer, "cold": cold,
    }  # fmt: skip
    for marker, make in kinds.items():
        path = folder / FILES[marker]
        found[marker] = MISSING
        if path.exists():
            found[marker] = make(json.loads(path.read_text(encoding="utf-8")))
    return found
