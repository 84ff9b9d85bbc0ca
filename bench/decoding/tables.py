# SPDX-License-Identifier: Apache-2.0
"""Markdown and a picture of decode.py's result file."""

from __future__ import annotations

from decoding.results import PARTS, speed_up
from decoding.step import PART_NAMES


def title_of(point: dict) -> str:
    if point["kind"] == "spense":
        return f"ours, {point['dense']:.1%} dense".replace(".0%", "%")
    if point["kind"] == "two_library":
        return f"two libraries, {point['dense']:.1%} dense".replace(".0%", "%")
    return "dense FP8"


def decode_table(results: dict) -> str:
    """All points; a line each."""
    points = results["points"]
    head = [
        "model",
        "",
        "batch",
        "context",
        "KV cache",
        "linear layers",
        "ms",
        "tokens/s",
        "x dense",
    ]
    head += [*PARTS, "peak GiB"]
    lines = [_row(head), _row(["---"] * len(head))]
    order = {"dense": 0, "two_library": 1, "spense": 2}
    for p in sorted(
        points,
        key=lambda p: (
            p["model"],
            p["what"],
            p["cache"],
            p["context"],
            p["batch"],
            order[p["kind"]],
            p["dense"] or 0,
        ),
    ):
        ratio = speed_up(p, points)
        parts = p.get("parts_ms") or {}
        cells = [p["model"], p["what"], p["batch"], p["context"], p["cache"], title_of(p)]
        cells += [f"{p['ms']:.3f}", f"{p['tokens_per_s']:.0f}"]
        cells += ["" if ratio is None else f"{ratio:.3f}"]
        cells += [f"{parts[name]:.3f}" if name in parts else "" for name in PARTS]
        lines.append(_row([str(cell) for cell in (*cells, f"{p['peak_gib']:.1f}")]))
    names = "; ".join(f"{short}: {PART_NAMES[short]}" for short in PARTS)
    devices = {run["device"]["name"] for run in results["runs"]}
    days = sorted(run["created"][:10] for run in results["runs"])
    commits = ", ".join(sorted({run["commit"][:7] for run in results["runs"]}))
    lines += [
        "",
        "Milliseconds a step (a whole prompt for prefill), medians of CUDA-graph replays. x dense "
        "compares with the dense FP8 model of the same run. The parts are graphs of their own, so "
        f"they need not add up: {names}. {', '.join(sorted(devices))}, commit {commits}, "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}.",
    ]
    return "\n".join(lines)


def decode_figure(results: dict):
    """Speed-up over dense FP8 by batch, a panel for each model and cache."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [p for p in results["points"] if p["what"] == "decode" and p["kind"] != "dense"]
    panels = sorted({(p["model"], p["cache"]) for p in points})
    figure, axes = plt.subplots(
        1, max(1, len(panels)), figsize=(4.5 * max(1, len(panels)), 4), sharey=True, squeeze=False
    )
    for panel, (model, cache) in zip(axes[0], panels, strict=False):
        here = [p for p in points if (p["model"], p["cache"]) == (model, cache)]
        of_line = ("kind", "dense", "context")
        for line in sorted({tuple(p[name] for name in of_line) for p in here}):
            some = [p for p in here if tuple(p[name] for name in of_line) == line]
            series = sorted((p["batch"], speed_up(p, results["points"])) for p in some)
            series = [(batch, ratio) for batch, ratio in series if ratio]
            if series:
                style = "-" if line[0] == "spense" else "--"
                label = f"{title_of(some[0])}, context {line[2]}"
                panel.plot(*zip(*series, strict=True), style, marker=".", label=label)
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("batch")
        panel.set_title(f"{model}, KV cache in {cache}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    axes[0][0].set_ylabel("decoding speed over the dense FP8 model")
    figure.tight_layout()
    return figure


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
