# SPDX-License-Identifier: Apache-2.0
"""The demo's results as JSON and as a table for the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from spense_kernels.prune.store import write_text

REPORT_VERSION = 1

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def write_json(report: dict, path: Path) -> None:
    """Write the report beside `path`, then rename, so that a reader never sees half of it."""
    write_text(path, to_text(report))


def to_text(report: dict) -> str:
    """JSON with one line for each record of a list, so that diffs of reports stay readable."""
    lines = []
    for key, value in report.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            records = ",\n".join("    " + _compact(record) for record in value)
            text = f"[\n{records}\n  ]"
        elif isinstance(value, dict):
            members = (f"    {json.dumps(k)}: {_compact(v)}" for k, v in value.items())
            text = "{\n" + ",\n".join(members) + "\n  }"
        else:
            text = _compact(value)
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _compact(value) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def readable_bytes(count: float) -> str:
    for size, unit in _UNITS:
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def plus_minus(value: float, error: float | None, digits: int = 2) -> str:
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


HEADER = (
    "method",
    "perplexity",
    "nats above original",
    "dense columns",
    "kept weights",
    "linear layers, B/token",
    "with lm_head",
)


def rows(report: dict) -> list[tuple[str, ...]]:
    """The comparison, one tuple of strings a method, in the columns of HEADER."""
    out = []
    for method in report["methods"]:
        difference = method["above_original"]
        out.append(
            (
                method["label"],
                plus_minus(method["ppl"], method["ppl_stderr"]),
                "0" if difference is None else plus_minus(*difference.values(), digits=3),
                f"{method['dense_fraction']:.1%}",
                f"{method['kept_fraction']:.1%}",
                readable_bytes(method["linear_bytes_per_token"]),
                readable_bytes(method["model_bytes_per_token"]),
            )
        )
    return out


def table(report: dict) -> str:
    """The comparison as aligned text."""
    lines = [HEADER, *rows(report)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    text.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in text)


def summary(report: dict) -> str:
    """Everything a user wants on the screen after a run."""
    text = report["text"]
    parts = [
        f"Test text: {text['test_tokens']:,} tokens of {text['name']}; ± is the standard error by "
        f"window of {text['window']} tokens.",
        "",
        table(report),
        "",
        "Nats above original are paired by window. B/token: weight bytes read for one token at "
        "batch 1, as packed;",
        f"lm_head ({readable_bytes(report['model']['lm_head_bytes'])}, "
        "not pruned) is the same for all.",
    ]
    for sample in report["continuations"]:
        parts += ["", f"Prompt:    {sample['prompt']}"]
        parts += [f"  original: {_one_line(sample['original'])}"]
        parts += [f"  hybrid:   {_one_line(sample['hybrid'])}"]
    ops = report["ops"]
    parts += [
        "",
        f"The hybrid model ran in a new process, from its checkpoint: {ops['layers']} layers, "
        f"{ops['calls']:,} calls of torch.ops.spense.hybrid_gemm "
        f"({ops['expected_calls']:,} expected).",
        f"{report['total_seconds']:.0f} s in all, peak memory over all processes "
        f"{report['peak_memory_bytes'] / 1e9:.2f} GB.",
    ]
    return "\n".join(parts)


def _one_line(text: str) -> str:
    return " ".join(text.split())
