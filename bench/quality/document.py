# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/pruning.md from bench/results/quality.json, between their markers.

`python bench/quality/document.py` rewrites the page; `--check` fails when it is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "bench" / "results" / "quality.json"
PAGE = ROOT / "docs" / "pruning.md"
STEPS = re.compile(r"a\d |random|magnitude col|activation|obs col|dense first|sequential|search ")


def table(rows: dict, names: list[str]) -> str:
    lines = [
        "| row | dense | PPL | nats above dense | R | outside PPL | outside R | prune s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = rows["dense"]["test"]["nll"]
    for name in names:
        row, test, outside = rows[name], rows[name]["test"], rows[name]["outside"]
        share = f"{row['dense_fraction']:.1%}" if "dense_fraction" in row else "100 %"
        seconds = f"{row['prune_seconds']:.1f}" if "prune_seconds" in row else ""
        lines.append(
            f"| {name} | {share} | {test['ppl']:.2f} | {test['nll'] - base:+.4f} | "
            f"{test['r']:.3f} ± {test['r_stderr']:.3f} | {outside['ppl']:.2f} | "
            f"{outside['r']:.3f} | {seconds} |"
        )
    return "\n".join(lines)


def setup(result: dict) -> str:
    s, machine = result["setup"], result["machine"]
    tokens = s["window_tokens"]
    return (
        f"{s['model']}; {s['calibration_windows']} calibration windows and {s['test_windows']} "
        f"test windows of {tokens} tokens ({s['test_windows'] * (tokens - 1):,} predictions), "
        f"{s['outside_windows']} windows of the Jargon File as text from outside; softmax over "
        f"the {s['softmax_tokens']:,} tokens that occur in the texts; calibration seed "
        f"{s['calibration_seed']}; k_shards 1 unless a row says otherwise; {machine['device']}, "
        f"torch {machine['torch']}."
    )


def render(page: str, result: dict) -> str:
    rows = result["rows"]
    main = [name for name in rows if not STEPS.match(name) and "search" not in name]
    steps = [name for name in rows if name not in main]
    parts = {"setup": setup(result), "main": table(rows, main), "steps": table(rows, steps)}
    for name, text in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"{PAGE.name}: no markers <!-- {name} --> ... <!-- /{name} -->")
        page = pattern.sub(lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page)
    return page


def main() -> int:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    old = PAGE.read_text(encoding="utf-8")
    new = render(old, result)
    if "--check" in sys.argv[1:]:
        if old != new:
            print(f"{PAGE.name} is out of date: run {Path(__file__).name}", file=sys.stderr)
        return int(old != new)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
