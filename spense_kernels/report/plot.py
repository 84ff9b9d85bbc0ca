# SPDX-License-Identifier: Apache-2.0
"""The report as one picture; needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from spense_kernels.prune.store import write_atomic

INK, GRID, LINE, MARK = "#1f2933", "#d9dee3", "#2d8a6a", "#c8553d"


def write_png(found: dict, path: Path) -> None:
    """Draw R and perplexity against speed, sensitivity by layer, and the map of dense columns."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK}
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 2, figsize=(12.5, 9), dpi=110, layout="constrained")
        figure.suptitle(f"{found['source']}: quality against modelled decode speed (H100)")
        _draw_pareto(axes[0, 0], found["rows"], "r", "R (0: plain 2:4, 1: dense)")
        _draw_pareto(axes[0, 1], found["rows"], "ppl", "perplexity")
        _draw_sensitivity(axes[1, 0], found)
        _draw_map(figure, axes[1, 1], found["layers"])
        try:
            write_atomic(path, lambda file: figure.savefig(file, format="png"))
        finally:
            plt.close(figure)


def _draw_pareto(axes, rows: list[dict], what: str, label: str) -> None:
    points = [row for row in rows if "speed" in row and row[what] is not None]
    speeds = [row["speed"]["tokens_per_s"] for row in points]
    # Perplexity's error is that of the text, the same for all points; R's is paired.
    errors = [row["r_stderr"] or 0.0 for row in points] if what == "r" else None
    axes.errorbar(
        speeds, [row[what] for row in points], yerr=errors,
        fmt="o-", color=LINE, ecolor=GRID, capsize=3,
    )  # fmt: skip
    for row, speed in zip(points, speeds, strict=True):
        axes.annotate(
            f"{row['asked_fraction']:.1%}", (speed, row[what]), xytext=(5, 5),
            textcoords="offset points", color=MARK if row["chosen"] else INK,
            weight="bold" if row["chosen"] else "normal",
        )  # fmt: skip
    by_key = {row["key"]: row for row in rows}
    for key, style in (("dense", "--"), ("sparsegpt", ":")):
        if by_key[key][what] is not None:
            axes.axhline(by_key[key][what], color=INK, linewidth=0.8, linestyle=style)
    batch = points[0]["speed"]["batch"] if points else 0
    axes.set_xlabel(f"tokens/s of the pruned projections, batch {batch}")
    axes.set_ylabel(label)
    axes.set_title("by dense fraction; dashed: dense, dotted: plain 2:4", loc="left", fontsize=9)
    axes.grid(color=GRID)


def _draw_sensitivity(axes, found: dict) -> None:
    """Predicted nats at 2:4 a projection, or the output errors where there are none."""
    layers = {layer["name"]: layer for layer in found["layers"]}
    predicted = {x["name"]: x["nats"][0] for x in found["sensitivity"]}
    values = predicted or {name: layer["rel_error"] for name, layer in layers.items()}
    kinds = dict.fromkeys(layer["kind"] for layer in found["layers"])
    for kind in kinds:
        own = [x for x in layers.values() if x["kind"] == kind and x["name"] in values]
        if own:
            places, heights = [x["index"] for x in own], [values[x["name"]] for x in own]
            axes.plot(places, heights, "o-", markersize=3, linewidth=1, label=kind)
    if any(value > 0 for value in values.values()):
        axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("nats a token at 2:4, predicted" if predicted else "output error / energy")
    axes.set_title("Sensitivity of each projection", loc="left", fontsize=9)
    axes.grid(color=GRID)
    axes.legend(fontsize=7, ncols=4, frameon=False)


def _draw_map(figure, axes, layers: list[dict]) -> None:
    image = axes.imshow(
        [layer["dense_map"] for layer in layers],
        aspect="auto", interpolation="nearest", cmap="Greens", vmin=0, vmax=1,
    )  # fmt: skip
    step = max(1, len(layers) // 24)
    labels = [f"{layer['index']} {layer['kind']}" for layer in layers[::step]]
    axes.set_yticks(range(0, len(layers), step), labels, fontsize=6)
    axes.set_xticks([])
    axes.set_xlabel("input columns, first to last")
    axes.set_title("Share of each column's weights that stays dense", loc="left", fontsize=9)
    figure.colorbar(image, ax=axes, fraction=0.03)
