# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/pruning*.md from the committed results, between their markers.

quality.json is the table of single ideas; quality_h100.json holds what was tried on top of it, and
quality_explore.json what was tried after that.

`python bench/quality/document.py` rewrites the pages; `--check` fails when one is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import comparisons

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "docs" / name for name in ("pruning.md", "pruning-comparisons.md")]
STEPS = re.compile(
    r"a\d |s\d |random|magnitude col|activation|obs col|dense first|sequential|search |fp8 rounded"
)


def table(rows: dict, names: list[str]) -> str:
    lines = [
        "| row | dense | FP8 | PPL | nats above dense | R | outside PPL | outside R | prune s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = rows["dense"]["test"]["nll"]
    for name in names:
        row, test, outside = rows[name], rows[name]["test"], rows[name]["outside"]
        share = f"{row.get('dense_fraction', 1.0):.1%}"
        fp8 = "W, A" if row.get("config", {}).get("fp8") else ""
        seconds = f"{row['prune_seconds']:.1f}" if "prune_seconds" in row else ""
        lines.append(
            f"| {name} | {share} | {fp8} | {test['ppl']:.2f} | {test['nll'] - base:+.4f} | "
            f"{test['r']:.3f} ± {test['r_stderr']:.3f} | {outside['ppl']:.2f} | "
            f"{outside['r']:.3f} | {seconds} |"
        )
    return "\n".join(lines)


def setup(result: dict) -> str:
    s, machine = result["setup"], result["machine"]
    tokens = s["window_tokens"]
    status = f"{s['status'].capitalize()}. " if "status" in s else ""
    return status + (
        f"{s['model']}; {s['calibration_windows']} calibration windows and {s['test_windows']} "
        f"test windows of {tokens} tokens ({s['test_windows'] * (tokens - 1):,} predictions), "
        f"{s['outside_windows']} windows of the Jargon File as text from outside; softmax over "
        f"the {s['softmax_tokens']:,} tokens that occur in the texts; calibration seed "
        f"{s['calibration_seed']}; k_shards 1 unless a row says otherwise; {machine['device']}, "
        f"torch {machine['torch']}."
    )


def times(result: dict) -> str:
    """Fine-tunes: what they cost and gave."""
    lines = [
        "| row | steps | tokens | seconds | R | validation R | outside R |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        if "tune_seconds" in row:
            lines.append(
                f"| {name} | {row['steps']} | {row['tokens']:,} | {row['tune_seconds']:.0f} | "
                f"{row['test']['r']:.3f} | {row['validation']['r']:.3f} | "
                f"{row['outside']['r']:.3f} |"
            )
    return "\n".join(lines)


def validation(result: dict) -> str:
    """Ideas in the order they were tried: the validation windows decided."""
    lines = [
        "| row | validation R | test R | outside R | prune s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        if re.match(r"[se]\d+ ", name):
            lines.append(
                f"| {name} | {row['validation']['r']:.3f} ± {row['validation']['r_stderr']:.3f} | "
                f"{row['test']['r']:.3f} ± {row['test']['r_stderr']:.3f} | "
                f"{row['outside']['r']:.3f} | {row['prune_seconds']:.1f} |"
            )
    return "\n".join(lines)


def parts(prefix: str, result: dict) -> dict[str, str]:
    """Text by marker."""
    rows = result["rows"]
    main = [name for name in rows if not STEPS.match(name) and "search" not in name]
    found = {f"{prefix}setup": setup(result), f"{prefix}main": table(rows, main)}
    if any("validation" in row for row in rows.values()):
        found |= {f"{prefix}steps": validation(result), f"{prefix}tune": times(result)}
    else:
        steps = [name for name in rows if name not in main]
        found[f"{prefix}steps"] = table(rows, steps)
    return found


def tables() -> dict[str, str]:
    """Text by marker, of all pages."""
    found = comparisons.parts(RESULTS)
    for prefix, name in (("", "quality.json"), ("h100-", "quality_h100.json")):
        result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        found |= parts(prefix, result)
    result = json.loads((RESULTS / "quality_explore.json").read_text(encoding="utf-8"))
    return found | {"explore-setup": setup(result), "explore-steps": validation(result)}


def render(pages: list[str]) -> list[str]:
    """The pages with every table between its markers, which stand in one of them."""
    for marker, text in tables().items():
        pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
        if not any(pattern.search(page) for page in pages):
            raise SystemExit(f"no page has markers <!-- {marker} --> ... <!-- /{marker} -->")
        pages = [pattern.sub(lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page) for page in pages]
    return pages


def main() -> int:
    old = [page.read_text(encoding="utf-8") for page in PAGES]
    for page, before, after in zip(PAGES, old, render(old), strict=True):
        if before == after:
            continue
        if "--check" in sys.argv[1:]:
            print(f"{page.name} is out of date: run {Path(__file__).name}", file=sys.stderr)
            return 1
        page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
