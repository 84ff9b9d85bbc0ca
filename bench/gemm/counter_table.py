# SPDX-License-Identifier: Apache-2.0
"""Point by point what stands in the way of a missed target: a table from counters and a sweep."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gemm.counters import missed_points
from gemm.shapes import MODELS
from gemm.tables import row, run_line
from gemm.targets import checks_of

PORT_BYTES = 64  # a cycle and multiprocessor, from L2
BINDS, LEANS = 0.8, 0.6  # share of a unit from which it binds, or is what comes nearest to it
MAIN = ("x cuBLASLt", "x cuSPARSELt")  # targets that are told where they are met, too
CUT, IDLE = 0.2, 0.8  # share of the fix-up in L2 bytes, of the time that multiprocessors are busy
KERNEL_LETTERS = 24  # of a name of another kind
TITLES = {"tensor": "tensor cores", "port": "SM's port", "l2": "L2", "dram": "DRAM"}


@dataclass(frozen=True)
class Shares:
    """Of one launch alone: its time, and how much of each unit it keeps busy, 0 to 1."""

    us: float
    units: dict[str, float]  # of TITLES, those that were counted
    busy: float | None  # multiprocessors with work, mean over the launch
    fixup: float | None  # of all L2 bytes: sums of cut tiles, written and read again

    def binding(self) -> str:
        """In words, what limits the launch."""
        if not self.units:
            return "not counted"
        most = max(self.units, key=self.units.__getitem__)
        share, title = self.units[most], TITLES[most]
        words = [title] if share >= BINDS else [f"most of all {title}"]
        if share < LEANS:
            words = [f"no unit ({title} first)"]
        if self.fixup is not None and self.fixup >= CUT:
            words.append("fix-up")
        if self.busy is not None and self.busy < IDLE:
            words.append("idle SMs")
        return ", ".join(words)


def shares(launch: dict, multiprocessors: int, y_bytes: int | None = None) -> Shares:
    """From the counters of a launch; `y_bytes` of its result where the fix-up is asked for."""
    cycles, units = launch.get("cycles"), {}
    tensor = launch.get("tensor_pct", launch.get("tensor_hmma_pct"))
    if tensor is not None:
        units["tensor"] = tensor / 100
    if cycles and "ingest_bytes" in launch:
        units["port"] = launch["ingest_bytes"] / (PORT_BYTES * cycles * multiprocessors)
    for name in ("l2", "dram"):
        percent = launch.get(f"{name}_pct", launch.get(f"{name}_read_pct"))
        if percent is not None:
            units[name] = percent / 100
    active = launch.get("cycles_active")
    fixup = None
    if y_bytes is not None and "egress_bytes" in launch and launch.get("l2_bytes"):
        fixup = max(0.0, 2 * (launch["egress_bytes"] - y_bytes) / launch["l2_bytes"])
    busy = active / cycles if active and cycles else None
    return Shares(launch.get("ns", 0.0) / 1e3, units, busy, fixup)


def together(launches: list[dict], multiprocessors: int) -> Shares:
    """Several launches as one, weighted by their times."""
    parts = [shares(launch, multiprocessors) for launch in launches]
    us = sum(part.us for part in parts)
    names = [name for name in TITLES if parts and all(name in part.units for part in parts)]
    units = {n: sum(p.us * p.units[n] for p in parts) / us for n in names} if us else {}
    return Shares(us, units, None, None)


def table(counted: dict, sweep: dict) -> str:
    """A row for every layer that misses a target, alone or in its model's sum, and for each sum.

    Those without counters, as a run's time left them out or they were met when it was made, have
    the sweep's columns alone.
    """
    run = counted["run"]
    multiprocessors = run["device"]["multiprocessors"]
    swept = {(p["layer"], p["m"], p["dense"]): p for p in sweep["points"]}
    entries = {(e["layer"], e["m"], e["dense"]): e for e in counted["points"]}
    wanted = {(p.layer, p.m, p.dense) for p in missed_points(sweep["points"])}
    head = ["layer", "M", "dense", "asked", "reached", "us in a chain", "of floor", "us alone"]
    head += ["config", *TITLES.values(), "SMs busy", "fix-up", "rival alone, us"]
    head += ["its tensor cores", "its port", "its kernel", "what binds"]
    lines = [row(head), row(["---"] * len(head))]
    keys = sorted({(dense, m, layer.partition(".")[0]) for layer, m, dense in wanted})
    shown, used = [], {swept[key]["run"] for key in wanted}
    for dense, m, model in keys:
        for label in (layer.label for layer in MODELS[model]):
            if (label, m, dense) in wanted:
                point, entry = swept[label, m, dense], entries.get((label, m, dense))
                shown += [entry] if entry else []
                of_units = _counted(entry, point, multiprocessors) if entry else []
                lines.append(_line(head, [label, *_asked(point), *of_units]))
        total = swept.get((model, m, dense))
        if total:
            lines.append(_line(head, [f"{model}, all four", *_asked(total)]))
    clocks = sorted(e["ours"]["hz"] / 1e9 for e in shown if "hz" in e["ours"])
    clock = f" at {clocks[0]:.2f} to {clocks[-1]:.2f} GHz" if clocks else ""
    left = len(wanted) - len(shown)
    lines += [
        "",
        "Targets missed are bold. Counters are of one launch alone with cold caches"
        f"{clock} (Nsight Compute, clocks left alone, commit {run['commit'][:7]}), times in a "
        f"chain are the sweep's. The port can take {PORT_BYTES} bytes a cycle and multiprocessor; "
        "fix-up is twice what multiprocessors write beyond y, of all bytes at L2. A unit binds "
        f"from {BINDS:.0%} on and comes nearest to it from {LEANS:.0%}. The rival is cuBLASLt, at "
        "0 % dense cuSPARSELt; its kernels are named by tile, K of a step and steps of the "
        "ring. "
        + (f"Not counted in that run: {left} of {len(wanted)} layers. " if left else "")
        + (run_line(sweep, used) if used else ""),
    ]
    return "\n".join(lines)


def _line(head: list[str], cells: list[str]) -> str:
    return row([*cells, *[""] * (len(head) - len(cells))])


def _asked(point: dict) -> list[str]:
    """Where; what is asked and reached, missed ones bold; the time and its share of the floor."""
    found = [c for c in checks_of(point) if c.what in MAIN or not c.met]
    us = point["times"]["spense"]["us"]
    least = ", ".join(f"{c.least:.2f} {c.what}" for c in found)
    got = ", ".join(f"{c.got:.3f}" if c.met else f"**{c.got:.3f}**" for c in found)
    where = [str(point["m"]), f"{100 * point['dense']:.3g}%"]
    return [*where, least, got, f"{us:.1f}", f"{point['floor_us'] / us:.0%}"]


def _counted(entry: dict, point: dict, multiprocessors: int) -> list[str]:
    ours = shares(entry["ours"], multiprocessors, 2 * point["m"] * point["n"])
    rival = together(entry["theirs"], multiprocessors)
    return [
        f"{ours.us:.1f}",
        entry["ours"].get("config", ""),
        *(_percent(ours.units.get(name)) for name in TITLES),
        *(_percent(ours.busy), _percent(ours.fixup)),
        f"{rival.us:.1f}" if rival.us else "",
        *(_percent(rival.units.get(name)) for name in ("tensor", "port")),
        " + ".join(_short(launch["kernel"]) for launch in entry["theirs"]),
        ours.binding(),
    ]


def _short(kernel: str) -> str:
    """cuBLASLt's tile and ring, 168x128_128x5 of nvjet_sm90_qqtst_168x128_128x5_1x2_h_bz_TNN."""
    found = re.search(r"_(\d+x\d+_\d+x\d+)_", kernel)
    return found[1] if found else kernel[:KERNEL_LETTERS]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
