# SPDX-License-Identifier: Apache-2.0
"""What the op's choice of a configuration loses against the best one, from a sweep's `configs`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from gemm.cost_model import MULTIPROCESSORS, Model, choice
from gemm.tables import row, run_line

AUTO = "auto"  # the op's own choice in a result file
SMOOTH = 0.05  # no other configuration may be faster by more
UNTIMED = 0.5  # regret of a configuration that a first launch showed to be far behind (choices.py)


def regret_of(times: dict[str, dict]) -> float:
    """Time of the op's choice over the least time, less 1; 0 where nothing was faster."""
    return times[AUTO]["us"] / min(t["us"] for t in times.values()) - 1


@dataclass(frozen=True)
class Point:
    """One problem: microseconds of the op's choice, and of what was fastest, maybe the choice."""

    layer: str
    m: int
    dense: float
    auto_us: float
    best_us: float
    best: str
    forced: int  # configurations that were timed

    @property
    def regret(self) -> float:
        return self.auto_us / self.best_us - 1

    def __str__(self) -> str:
        return (
            f"{self.layer:<20} {self.m:>5} {self.dense:>6.1%} | auto {self.auto_us:8.2f} us, best "
            f"{self.best_us:8.2f} us {self.best:<26} regret {self.regret:6.1%}"
        )


def points(results: dict) -> list[Point]:
    """Every problem of the file of which the op's choice and another configuration were timed."""
    problems: dict[tuple, dict[str, float]] = {}
    for entry in results["configs"]:
        key = entry["layer"], entry["m"], entry["dense"]
        problems.setdefault(key, {})[entry["config"]] = entry["us"]
    found = []
    for key, times in problems.items():
        if AUTO in times and len(times) > 1:
            best = min(times, key=times.__getitem__)
            found.append(Point(*key, times[AUTO], times[best], best, len(times) - 1))
    return found


def chosen_anew(results: dict) -> dict:
    """The file with "auto" as what today's cost model chooses: the forced run of that name.

    A cost model made after a run can thus be judged by it. Both times are then of forced runs, and
    medians where a file holds several runs; the measured times of the op's own choice, which an
    older model made, are left out.
    """
    model = Model.read()
    forced: dict[tuple, list[dict]] = {}
    for entry in results["configs"]:
        if entry["config"] != AUTO:
            key = tuple(entry[of] for of in ("m", "n", "k", "packed_bytes", "layer", "dense"))
            forced.setdefault(key, []).append(entry)
    configs = []
    for key, entries in forced.items():
        device = results["runs"][entries[0]["run"]]["device"]
        m, n, k, packed, *_ = key
        found = choice(model, n, k, m, packed, device.get("multiprocessors", MULTIPROCESSORS))
        times: dict[str, list[float]] = {}
        for entry in entries:
            times.setdefault(entry["config"], []).append(entry["us"])
        us = {config: statistics.median(of) for config, of in times.items()}
        us[AUTO] = us.get(found, min(us.values()) * (1 + UNTIMED))
        configs += [entries[0] | {"config": config, "us": of} for config, of in us.items()]
    return results | {"configs": configs}


def mean(some: list[Point]) -> float:
    return sum(p.regret for p in some) / len(some)


def summary(some: list[Point]) -> str:
    """A sentence, and the problems above the limit, one a line."""
    if not some:
        return "no problem was timed"
    over = sorted((p for p in some if p.regret > SMOOTH), key=lambda p: -p.regret)
    worst = max(some, key=lambda p: p.regret)
    lines = [
        f"{len(some)} problems: regret mean {mean(some):.2%}, worst {worst.regret:.1%}, "
        f"{len(over)} above {SMOOTH:.0%}"
    ]
    return "\n".join([*lines, *(str(p) for p in over)])


def by_layer(results: dict) -> str:
    """A table of layers by dense fraction or, where there is one fraction, by M."""
    some = points(results)
    fractions, tokens = (sorted({getattr(p, of) for p in some}) for of in ("dense", "m"))
    several = len(fractions) > 1
    titles = [f"{100 * d:.3g} %" for d in fractions] if several else [f"M = {m}" for m in tokens]
    head = ["layer", *titles, "mean"]
    lines = [row(head), row(["---"] * len(head))]
    for layer in dict.fromkeys(p.layer for p in some):
        of_layer = [p for p in some if p.layer == layer]
        cells = [layer]
        for value in fractions if several else tokens:
            here = [p for p in of_layer if value == (p.dense if several else p.m)]
            cells.append(_cell(here) if here else "")
        lines.append(row([*cells, f"{mean(of_layer):.1%}"]))
    over = [p for p in some if p.regret > SMOOTH]
    worst = max(some, key=lambda p: p.regret)
    lines += [
        "",
        f"{len(some)} problems, {sum(p.forced for p in some)} forced runs"
        f"{'' if several else f' at {fractions[0]:.0%} dense'}: mean {mean(some):.2%}, worst "
        f"{worst.regret:.1%} ({_place(worst)}), above 3 % {sum(p.regret > 0.03 for p in some)}, "
        f"above {SMOOTH:.0%} {len(over)}, above 8 % {sum(p.regret > 0.08 for p in some)}."
        f"{' Cells: mean / worst over all M.' if several else ''} "
        + run_line(results, {entry["run"] for entry in results["configs"]}),
    ]
    if over:
        over.sort(key=lambda p: -p.regret)
        named = "; ".join(f"{_place(p)} {p.regret:.1%}, `{p.best}` is faster" for p in over[:12])
        more = f"; and {len(over) - 12} more" if len(over) > 12 else ""
        lines += ["", f"Above {SMOOTH:.0%}: {named}{more}."]
    return "\n".join(lines)


def _place(p: Point) -> str:
    return f"{p.layer}, M = {p.m}, {100 * p.dense:.3g} % dense"


def _cell(here: list[Point]) -> str:
    worst = max(p.regret for p in here)
    return f"{worst:.1%}" if len(here) == 1 else f"{mean(here):.1%} / {worst:.1%}"
