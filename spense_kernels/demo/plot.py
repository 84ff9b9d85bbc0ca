# SPDX-License-Identifier: Apache-2.0
"""The demo's report as one picture."""

from __future__ import annotations

from pathlib import Path

from spense_kernels.demo.report import HEADER, rows
from spense_kernels.prune.store import write_atomic

INK = "#1f2933"
GRID = "#d9dee3"
COLOURS = {"original": "#7b8794", "fp8": "#3e7cb1", "sparse": "#c8553d", "hybrid": "#2d8a6a"}
GROUP_COLOURS = ("#3e7cb1", "#81a4cd", "#2d8a6a", "#e9a23b", "#c8553d", "#8f5ea8", "#5c6b73")


def write_png(report: dict, path: Path) -> None:
    """Draw perplexity, error of each layer, map of dense columns and table; write atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(13, 11.5), dpi=110, facecolor="white")
        grid = figure.add_gridspec(
            3, 2, height_ratios=(1.05, 1.1, 0.5), left=0.07, right=0.97, top=0.9, bottom=0.02,
            hspace=0.4, wspace=0.2,
        )  # fmt: skip
        _title(figure, report)
        _draw_perplexity(figure.add_subplot(grid[0, 0]), report)
        _draw_errors(figure.add_subplot(grid[0, 1]), report)
        _draw_maps(figure, grid[1, :], report)
        _draw_table(figure.add_subplot(grid[2, :]), report)
        try:
            write_atomic(path, lambda file: figure.savefig(file, format="png"))
        finally:
            plt.close(figure)


def _title(figure, report) -> None:
    model, settings = report["model"], report["settings"]
    figure.text(
        0.07, 0.965,
        f"{model['name']}: hybrid 2:4 + dense FP8, {settings['dense_fraction']:.0%} dense",
        fontsize=16, weight="bold",
    )  # fmt: skip
    text = report["text"]
    figure.text(
        0.07, 0.94,
        f"one-shot, {settings['method']} / {settings['strategy']}, "
        f"{text['calibration_tokens']:,} calibration and {text['test_tokens']:,} test tokens of "
        f"{text['name']}; FP8 weights and activations; CPU",
        fontsize=10,
    )  # fmt: skip


def _draw_perplexity(axes, report) -> None:
    methods = report["methods"]
    values = [m["ppl"] for m in methods]
    errors = [m["ppl_stderr"] or 0.0 for m in methods]
    places = range(len(methods))
    axes.bar(
        places, values, yerr=errors, width=0.62, capsize=5,
        color=[COLOURS.get(m["key"], INK) for m in methods], error_kw={"ecolor": INK},
    )  # fmt: skip
    for place, value, error in zip(places, values, errors, strict=True):
        axes.annotate(
            f"{value:.2f}", (place, value + error), xytext=(0, 4), textcoords="offset points",
            ha="center", weight="bold",
        )  # fmt: skip
    axes.set_xticks(list(places), [m["label"] for m in methods])
    axes.set_ylim(0, 1.15 * max(v + e for v, e in zip(values, errors, strict=True)))
    axes.set_ylabel("perplexity on held-out text")
    axes.set_title("Perplexity (bars: standard error by window)", loc="left", fontsize=11)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)


def _draw_errors(axes, report) -> None:
    from matplotlib.ticker import MaxNLocator

    for colour, kind in zip(_cycle(), _kinds(report["layers"]), strict=False):
        layers = [entry for entry in report["layers"] if entry["kind"] == kind]
        axes.plot(
            [entry["index"] for entry in layers],
            [entry["rel_error"] for entry in layers],
            "o-", markersize=3.5, linewidth=1.2, color=colour, label=kind,
        )  # fmt: skip
    if any(entry["rel_error"] > 0 for entry in report["layers"]):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("output error / output energy")
    axes.set_title("Error of each hybrid layer on calibration text", loc="left", fontsize=11)
    axes.grid(color=GRID)
    axes.legend(
        fontsize=8, ncols=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14),
        columnspacing=0.9, handlelength=1.2, handletextpad=0.4,
    )  # fmt: skip


def _draw_maps(figure, cell, report) -> None:
    groups = _same_maps(report["layers"])
    grid = cell.subgridspec(1, len(groups), wspace=0.16)
    image = None
    for place, (title, layers) in enumerate(groups):
        axes = figure.add_subplot(grid[0, place])
        columns = layers[0]["k"]
        image = axes.imshow(
            [entry["dense_map"] for entry in layers],
            aspect="auto", interpolation="nearest", cmap="Greens", vmin=0, vmax=1,
            extent=(0, columns, layers[-1]["index"] + 0.5, layers[0]["index"] - 0.5),
        )  # fmt: skip
        axes.set_title(title, fontsize=9)
        axes.set_xticks([0, columns // 2, columns])
        axes.tick_params(labelsize=8)
        axes.set_xlabel("input column", fontsize=9)
        if place:
            axes.set_yticklabels([])
        else:
            axes.set_ylabel("decoder layer")
            axes.annotate(
                "What stayed dense: share of weights kept dense, by input column",
                (0, 1.13), xycoords="axes fraction", fontsize=11,
            )  # fmt: skip
    bar = figure.colorbar(image, ax=figure.axes[2:], fraction=0.012, pad=0.012)
    bar.ax.tick_params(labelsize=8)


def _draw_table(axes, report) -> None:
    axes.axis("off")
    drawn = axes.table(cellText=rows(report), colLabels=HEADER, loc="center", cellLoc="center")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9.5)
    drawn.scale(1, 1.6)
    for (row, column), cell in drawn.get_celld().items():
        cell.set_edgecolor(GRID)
        if row == 0:
            cell.set_text_props(weight="bold")
        elif column == 0:
            key = report["methods"][row - 1]["key"]
            cell.set_text_props(weight="bold", color=COLOURS.get(key, INK))


def _kinds(layers) -> list[str]:
    return list(dict.fromkeys(entry["kind"] for entry in layers))


def _same_maps(layers) -> list[tuple[str, list[dict]]]:
    """(title, layers) for each picture; kinds whose maps agree in every layer share one."""
    groups: list[tuple[list[str], list[dict]]] = []
    for kind in _kinds(layers):
        own = [entry for entry in layers if entry["kind"] == kind]
        for names, others in groups:
            if _map_key(own) == _map_key(others):
                names.append(kind)
                break
        else:
            groups.append(([kind], own))
    return [(", ".join(names), own) for names, own in groups]


def _cycle():
    while True:
        yield from GROUP_COLOURS


def _map_key(layers) -> list:
    return [(entry["k"], entry["dense_map"]) for entry in layers]
