# SPDX-License-Identifier: Apache-2.0
"""Pictures from result files. The GEMM sweep: speed-up over M, roofline. decode.py: speed-up.

python bench/plot.py bench/results/gemm_h100.json      # docs/images/gemm_h100_*.png
python bench/plot.py bench/results/decode.json         # docs/images/decode_speedup.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from decoding.tables import decode_figure
from gemm.ceiling import DENSE_FLOPS, SPARSE_FLOPS
from gemm.report import DENSE, best, speed_up
from gemm.shapes import MODELS
from gemm.tables import DENSE_FRACTION, at_fraction, source_line

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
LIBRARIES = {"cuSPARSELt 2:4": ("cusparselt",), "two libraries": ("two_library_add",)}


def speed_up_figure(results: dict) -> plt.Figure:
    """A panel a model: each layer, all four together, and what libraries reach on all four."""
    points = at_fraction(results)
    models = [name for name in MODELS if any(p["group"] == name for p in points)]
    figure, panels = plt.subplots(
        1, max(1, len(models)), figsize=(5.5 * max(1, len(models)), 4), sharey=True, squeeze=False
    )
    for panel, model in zip(panels[0], models, strict=True):
        here = [p for p in points if p["group"] == model]
        for layer in MODELS[model]:
            series = [p for p in here if p["layer"] == layer.label]
            _line(panel, series, speed_up, label=layer.name, linewidth=1, marker=".")
        whole = [p for p in here if p["kind"] == "model"]
        _line(panel, whole, speed_up, label="all four", color="black", linewidth=2.5)
        for label, names in LIBRARIES.items():
            _line(
                panel,
                whole,
                lambda p, names=names: _ratio(p, names),
                label=f"{label}, all four",
                linestyle="--",
                linewidth=1.5,
            )
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("M (tokens)")
        panel.set_title(f"{model}, {DENSE_FRACTION:.0%} dense")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("speed-up over cuBLASLt FP8")
    panels[0][0].legend(fontsize=8)
    figure.text(0.01, 0.01, source_line(results), fontsize=6, color="gray")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def roofline_figure(results: dict) -> plt.Figure:
    """Effective TFLOP/s over FLOP a byte moved; the roof is that of a 25 % dense weight."""
    points = [p for p in at_fraction(results) if p["kind"] == "layer"]
    figure, panel = plt.subplots(figsize=(6.5, 4.5))
    rate = results["runs"][points[-1]["run"]]["floor_bytes_per_second"] if points else 1.0
    peak = 1 / ((1 - DENSE_FRACTION) / SPARSE_FLOPS + DENSE_FRACTION / DENSE_FLOPS)
    low, high = 1.0, 4.0 * peak / rate
    roof = [low * (high / low) ** (i / 200) for i in range(201)]
    panel.plot(roof, [min(x * rate, peak) / 1e12 for x in roof], color="black", label="floor")
    for model in dict.fromkeys(p["group"] for p in points):
        here = [p for p in points if p["group"] == model]
        panel.scatter(
            [p["flops"] / p["bytes"] for p in here],
            [p["flops"] / p["times"]["spense"]["us"] / 1e6 for p in here],
            s=14,
            label=model or "other shapes",
        )
    dense = [(p, best(p["times"], DENSE)) for p in points]
    panel.scatter(
        [p["flops"] / p["bytes"] for p, us in dense if us],
        [p["flops"] / us / 1e6 for p, us in dense if us],
        s=10,
        marker="x",
        color="gray",
        label="cuBLASLt FP8, same product",
    )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("FLOP (pruned ones counted) a byte of packed weight, x and y")
    panel.set_ylabel("TFLOP/s")
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=8)
    figure.text(0.01, 0.01, source_line(results), fontsize=6, color="gray")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _line(panel, points: list[dict], value, **style) -> None:
    found = sorted((p["m"], value(p)) for p in points if value(p))
    if found:
        panel.plot(*zip(*found, strict=True), **style)


def _ratio(point: dict, names: tuple[str, ...]) -> float | None:
    ours, dense = best(point["times"], names), best(point["times"], DENSE)
    return dense / ours if ours and dense else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.results:
        results = json.loads(path.read_text())
        whole_models = "tokens_per_s" in (results["points"] or [{}])[0]
        figures = {"speedup": speed_up_figure, "roofline": roofline_figure}
        for name, make in ({"speedup": decode_figure} if whole_models else figures).items():
            target = args.out / f"{path.stem}_{name}.png"
            # No date and no version inside: the same results give the same bytes.
            make(results).savefig(target, dpi=110, metadata={"Software": None})
            print(f"wrote {target}")


if __name__ == "__main__":
    main()
