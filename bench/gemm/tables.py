# SPDX-License-Identifier: Apache-2.0
"""Markdown tables from a result file of the sweep: a short one, and one with everything."""

from __future__ import annotations

from gemm.report import COPY, DENSE, best, speed_up
from gemm.shapes import MODELS

DENSE_FRACTION = 0.25
RIVALS = (
    ("cuBLASLt", DENSE),
    ("bf16", ("bf16",)),
    ("2:4", ("cusparselt",)),
    ("two libraries", ("two_library",)),
    ("with addition", ("two_library_add",)),
    ("copy", COPY),
    ("ours, fast_accum off", ("spense_promoted",)),
)


def at_fraction(results: dict, dense: float = DENSE_FRACTION) -> list[dict]:
    return [p for p in results["points"] if p["dense"] == dense and "spense" in p["times"]]


def short_table(results: dict) -> str:
    """Speed-up of both models' layers by M, at 25 % dense."""
    points = at_fraction(results)
    models = [name for name in MODELS if any(p["layer"] == name for p in points)]
    both = any("two_library_add" in p["times"] for p in points)
    head = ["M", *(f"{name}, four layers" for name in models), "slowest layer"]
    head += ["two libraries"] if both else []
    lines = [row(head), row(["---"] * len(head))]
    for m in sorted({p["m"] for p in points if p["kind"] == "model"}):
        here = [p for p in points if p["m"] == m]
        cells = [str(m)]
        sums = {p["layer"]: p for p in here if p["kind"] == "model"}
        for name in models:
            point = sums.get(name)
            cells.append(
                f"{_us(point['times']['spense'])} us, {_x(speed_up(point))}" if point else ""
            )
        layers = [r for p in here if p["kind"] == "layer" and (r := speed_up(p))]
        cells.append(_x(min(layers, default=None)))
        if both:
            rivals = [_between(p, ("two_library_add",), DENSE) for p in sums.values()]
            cells.append(" / ".join(_x(r) for r in rivals))
        lines.append(row(cells))
    return "\n".join(lines)


def source_line(results: dict) -> str:
    """Where the figures come from, in a sentence."""
    return run_line(results, {p["run"] for p in at_fraction(results)})


def run_line(results: dict, used: set[int]) -> str:
    """Device, versions and days of some runs of a result file, by number."""
    runs = [results["runs"][i] for i in sorted(used)]
    device, versions = runs[-1]["device"], runs[-1]["versions"]
    commits = ", ".join(sorted({run["commit"][:7] for run in runs}))
    days = sorted({run["created"][:10] for run in runs})
    return (
        f"{device['name']}, driver {device.get('driver', 'none')}, torch {versions['torch']}, "
        f"commit {commits}, {' to '.join(dict.fromkeys((days[0], days[-1])))}."
    )


def rival_words(results: dict) -> tuple[str, str]:
    """What the short table's figures are against, and a sentence on the two libraries if timed."""
    timed = {name for p in at_fraction(results) for name in p["times"]}
    scalings = [name for name in DENSE if name in timed]
    dense = "the faster of its two scalings" if len(scalings) > 1 else "scales per tensor"
    two = "Two libraries: cuSPARSELt and cuBLASLt with the addition, same figure. "
    return f"cuBLASLt FP8 ({dense})", two if "two_library_add" in timed else ""


def full_table(results: dict, group: str, dense: float) -> str:
    """Microseconds of ours and every rival, share of the floor; one line a layer and M."""
    points = [p for p in at_fraction(results, dense) if p["group"] == group]
    if dense != DENSE_FRACTION and any(p["kind"] == "model" for p in points):
        points = [p for p in points if p["kind"] == "model"]
    head = ["layer", "n x k", "M", "ours, us", *(f"{title}, us" for title, _ in RIVALS)]
    head += ["x cuBLASLt", "TFLOP/s", "GB/s", "of floor"]
    lines = [row(head), row(["---"] * len(head))]
    for p in sorted(points, key=lambda p: (p["m"], p["kind"] == "model", p["layer"])):
        us = p["times"]["spense"]["us"]
        name = "all four" if p["kind"] == "model" else p["layer"].rpartition(".")[2]
        cells = [name, f"{p['n']} x {p['k']}" if "n" in p else "", str(p["m"])]
        cells += [_us(p["times"]["spense"])]
        times = [best(p["times"], names) for _, names in RIVALS]
        cells += ["" if t is None else f"{t:.1f}" for t in times]
        cells += [_x(speed_up(p)), f"{p['flops'] / us / 1e6:.0f}", f"{p['bytes'] / us / 1e3:.0f}"]
        lines.append(row([*cells, f"{p['floor_us'] / us:.0%}"]))
    return "\n".join(lines)


def beside(results: dict, other: dict) -> str:
    """Both devices at 25 % dense: a model's four layers, ours and cuBLASLt's, and their ratios."""
    names = [_device(r) for r in (results, other)]
    head = ["model", "M", *(f"{name}, ours" for name in names), "ratio"]
    head += [*(f"{name}, cuBLASLt" for name in names), "ratio"]
    head += [f"x cuBLASLt, {name}" for name in names]
    lines = [row(head), row(["---"] * len(head))]
    theirs = {(p["layer"], p["m"]): p for p in at_fraction(other) if p["kind"] == "model"}
    for p in sorted(at_fraction(results), key=lambda p: (p["layer"], p["m"])):
        q = theirs.get((p["layer"], p["m"]))
        if p["kind"] != "model" or q is None:
            continue
        cells = [p["layer"], str(p["m"])]
        for rivals in (("spense",), DENSE):
            a, b = best(p["times"], rivals), best(q["times"], rivals)
            cells += [f"{a:.1f} us", f"{b:.1f} us", f"{a / b:.2f}"] if a and b else [""] * 3
        lines.append(row([*cells, _x(speed_up(p)), _x(speed_up(q))]))
    rates = [
        f"{name} {r['runs'][-1]['read_bytes_per_second'] / 1e12:.2f} TB/s"
        for name, r in zip(names, (results, other), strict=True)
        if "read_bytes_per_second" in r["runs"][-1]
    ]
    read = f" The copy kernel reads: {', '.join(rates)}." if rates else ""
    return "\n".join([*lines, "", f"Four layers, {DENSE_FRACTION:.0%} dense.{read}"])


def _device(results: dict) -> str:
    """H200 of NVIDIA H200."""
    words = results["runs"][-1]["device"]["name"].split()
    return next((word for word in words if word[-1].isdigit()), words[-1])


def full_tables(results: dict) -> str:
    """Every group of layers and dense fraction of the file, each under a heading; only whole models
    at other fractions than the main one."""
    parts = [source_line(results)]
    keys = dict.fromkeys((p["group"], p["dense"]) for p in results["points"])
    for group, dense in sorted(keys):
        parts.append(f"### {group or 'other shapes'}, {100 * dense:.3g}% dense")
        parts.append(full_table(results, group, dense))
    return "\n\n".join(parts)


def _between(point: dict, names: tuple[str, ...], base: tuple[str, ...]) -> float | None:
    ours, theirs = best(point["times"], names), best(point["times"], base)
    return theirs / ours if ours and theirs else None


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _us(summary: dict) -> str:
    return f"{summary['us']:.1f}"


def _x(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
