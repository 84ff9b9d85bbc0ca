# SPDX-License-Identifier: Apache-2.0
"""The cost model of csrc/heuristics/cost.cpp on arrays of forced runs; its constants in csrc."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from gemm import kernels
from spense_kernels.layout import BLOCK_BYTES, DENSE_UNIT_COLUMNS, TILE_ROWS, ceil_div, padded_k

HEURISTICS = Path(__file__).resolve().parents[2] / "csrc" / "heuristics"
COSTS, FORMULA = HEURISTICS / "sm90_costs.def", HEURISTICS / "cost.cpp"
# Constants of the device in cost.cpp, in the order of a parameter vector.
DEVICE = ("kDramBytesPerUs", "kL2BytesPerUs", "kLaunchUs", "kExponent", "kReread")
DEVICE += ("kZeroRowsNs", "kSpread", "kCompany")
L2_BYTES = 40e6
OF_CONFIG = ("sparse", "dense", "tile", "fix-up")  # microseconds, in sm90_costs.def
LEAST = 0.01  # of any constant, which is fitted as a logarithm
MULTIPROCESSORS = 132
MODES = ("whole", "stream")


@dataclass(frozen=True)
class Config:
    row_tiles: int
    tokens: int
    cluster_rows: int

    def tile_tokens(self, m: int) -> int:
        """As heuristics::tile_tokens of csrc/heuristics/gemm.h."""
        tiles = ceil_div(m, self.tokens)
        if tiles == 1 and self.cluster_rows == 1:
            return m
        store = 32 if self.tokens % 32 == 0 else 16 if self.tokens % 16 == 0 else 8
        return ceil_div(ceil_div(m, tiles), unit := max(8 * self.cluster_rows, store)) * unit

    def pieces_of_each(self, tiles: int, k_blocks: int, slots: int) -> int:
        """As heuristics::pieces_of_each of csrc/heuristics/gemm.h."""
        if tiles >= slots:
            return 0
        steps = ceil_div(k_blocks, 2)
        pieces = min(max(steps // 2, 1), slots // tiles)
        short_pieces = self.tokens <= 64 and steps * tiles <= 16 * slots
        return pieces if short_pieces or 10 * pieces * tiles >= 9 * slots else 0

    def slots(self, multiprocessors: int) -> int:
        """Clusters at a time, as gemm.cpp guesses them where no device can be asked."""
        size = self.cluster_rows
        return max(1, multiprocessors // size * (10 if size > 2 else 11) // 11)


@cache
def instances() -> dict[str, Config]:
    return {name: Config(*numbers[:3]) for name, numbers in kernels.instances().items()}


@dataclass
class Model:
    """Constants as they stand in csrc: `device` by name, `config` as in OF_CONFIG by name."""

    device: dict[str, float]
    config: dict[str, list[float]]

    @classmethod
    def read(cls) -> Model:
        text = FORMULA.read_text()
        device = {name: float(re.search(rf"\b{name} = ([\d.e+]+)", text)[1]) for name in DEVICE}
        rows = re.findall(r"^COST\((\w+),([^)]*)\)", COSTS.read_text(), re.MULTILINE)
        return cls(device, {name: [float(v) for v in row.split(",")] for name, row in rows})

    def write(self) -> None:
        text = FORMULA.read_text()
        for name, value in self.device.items():
            text = re.sub(rf"\b({name} = )[\d.e+]+", lambda m, v=value: m[1] + number_text(v), text)
        FORMULA.write_text(text)
        table = COSTS.read_text()
        for name, (sparse, dense, tile, fixup) in self.config.items():
            row = f"COST({name + ',':<22} {sparse:.3f}, {dense:.3f}, {tile:>5.2f}, {fixup:>5.2f})"
            table = re.sub(rf"^COST\({name},[^)]*\)", row, table, flags=re.MULTILINE)
        COSTS.write_text(table)

    def rounded(self) -> Model:
        """As `write` writes it."""
        device = {name: float(number_text(value)) for name, value in self.device.items()}
        digits = (3, 3, 2, 2)
        config = {
            name: [round(value, to) for value, to in zip(costs, digits, strict=True)]
            for name, costs in self.config.items()
        }
        return Model(device, config)

    def times(self, factor: float) -> Model:
        """All estimates by `factor`."""
        device = dict(self.device)
        for name in device:
            if name.endswith(("Us", "Ns")):
                device[name] *= 1 / factor if name.endswith("PerUs") else factor
        config = {name: [factor * value for value in c] for name, c in self.config.items()}
        return Model(device, config)

    def vector(self, names: list[str]) -> np.ndarray:
        values = [self.device[name] for name in DEVICE]
        values += [value for name in names for value in self.config[name]]
        return np.log(np.maximum(values, LEAST))

    def with_vector(self, vector: np.ndarray, names: list[str]) -> Model:
        values = np.exp(vector).tolist()
        device = dict(zip(DEVICE, values, strict=False))
        rest = values[len(DEVICE) :]
        n = len(OF_CONFIG)
        fitted = {name: rest[n * i : n * i + n] for i, name in enumerate(names)}
        return Model(device, self.config | fitted)


def number_text(value: float) -> str:
    return f"{value / 1e6:.3f}e6" if value >= 1e5 else f"{value:.3f}"


@dataclass
class Runs:
    """Forced runs as arrays, one entry a run; `shape` numbers the problem that a run is of.

    Every configuration has its entry, those without a run with nan in `us`.
    """

    names: list[str]  # of configs
    us: np.ndarray
    shape: np.ndarray
    config: np.ndarray
    stream: np.ndarray
    facts: dict[str, np.ndarray]
    shapes: list[tuple] = field(default_factory=list)  # (layer, n, k, m, dense, file and run)
    auto: dict[int, float] = field(default_factory=dict)  # shape -> us of the op's own choice

    def estimate(self, model: Model) -> np.ndarray:
        """estimate_us of cost.cpp for every run."""
        of_config = np.array([model.config[name] for name in self.names])[self.config]
        return estimate(model.device, *of_config.T, self.stream, self.facts)

    def only(self, keep: np.ndarray) -> Runs:
        facts = {name: values[keep] for name, values in self.facts.items()}
        arrays = (self.us[keep], self.shape[keep], self.config[keep], self.stream[keep])
        return Runs(self.names, *arrays, facts, self.shapes, self.auto)


def facts_of(
    config: Config, n: int, k: int, m: int, packed_bytes: int, multiprocessors: int
) -> dict[str, float]:
    """What the formula needs to know of a problem and a config."""
    row_tiles, blocks = ceil_div(n, TILE_ROWS), padded_k(k) // DENSE_UNIT_COLUMNS
    sparse = (4 * row_tiles * blocks - packed_bytes // BLOCK_BYTES) // 3 / row_tiles
    token_tiles = ceil_div(m, config.tokens)
    x_rows = ceil_div(row_tiles, config.row_tiles) * m
    size, slots = config.cluster_rows, config.slots(multiprocessors)
    tiles = ceil_div(row_tiles, config.row_tiles * config.cluster_rows) * token_tiles
    pieces = config.pieces_of_each(tiles, blocks, slots)
    return {
        "sparse": sparse,
        "dense": blocks - 2 * sparse,
        "zeros": ((token_tiles * config.tile_tokens(m) - m) / 32) ** 2 * blocks,
        "rounds": tiles / slots,
        "share": 1 / pieces if pieces else tiles / slots,
        "cut": pieces != 1,
        "begun": ceil_div(tiles, slots) + (not pieces and tiles % slots > 0),
        "tickets": size == 1,
        "company": size - 1 if token_tiles > 1 else 0,
        "token_tiles": token_tiles,
        "once": packed_bytes + m * k + 2 * m * n,
        "operands": packed_bytes + m * k,
        "l2": packed_bytes * token_tiles + x_rows * k / config.cluster_rows,
    }


def estimate(device: dict, sparse, dense, tile, fixup, stream, facts: dict) -> np.ndarray:
    rounds, token_tiles = facts["rounds"], facts["token_tiles"]
    units_us = facts["sparse"] * sparse + facts["dense"] * dense
    units_us = units_us + facts["zeros"] * device["kZeroRowsNs"] / 1000
    full = np.ceil(rounds)
    cut = facts["share"] * units_us + facts["begun"] * tile + facts["cut"] * fixup
    work = np.where(stream, cut, np.maximum(1, rounds) * (units_us + tile))
    again = device["kReread"] * np.maximum(0, facts["operands"] - L2_BYTES) * (token_tiles - 1)
    dram = (facts["once"] + np.where(stream, again, 0)) / device["kDramBytesPerUs"]
    l2 = facts["l2"] / device["kL2BytesPerUs"]
    power = device["kExponent"]
    us = (work**power + dram**power + l2**power) ** (1 / power)
    ahead = np.where(facts["tickets"], device["kSpread"] * us, 0)
    lacking = np.maximum(0, (full - rounds) * (units_us + tile) - ahead)
    us = us + np.where(~np.asarray(stream, bool) & (rounds > 1), lacking, 0)
    us = us * (1 + device["kCompany"] * facts["company"])
    return us + device["kLaunchUs"]


def estimates(
    model: Model, n: int, k: int, m: int, packed_bytes: int, multiprocessors: int
) -> dict[str, float]:
    """Microseconds of every NAME:MODE."""
    us = {}
    for name, config in instances().items():
        facts = facts_of(config, n, k, m, packed_bytes, multiprocessors)
        for mode in MODES:
            costs = model.config[name]
            us[f"{name}:{mode}"] = float(estimate(model.device, *costs, mode == "stream", facts))
    return us


def choice(model: Model, n: int, k: int, m: int, packed_bytes: int, multiprocessors: int) -> str:
    """NAME:MODE with the least estimate, as the op chooses where no device can be asked."""
    us = estimates(model, n, k, m, packed_bytes, multiprocessors)
    return min(us, key=us.__getitem__)


def tile_name(config: str) -> str:
    """A config's name without its rings, and without the k1 that older names had: runs of a build
    with other depths count as today's."""
    return re.sub(r"(k1)?_s\d+x\d+", "", config)


def read_runs(paths: list[Path], twice: bool = False) -> Runs:
    """The `configs` of sweep files. Unknown configs are left out.

    A problem of two runs is two problems: times of one run compare, those of two hardly. A sweep
    timed what the op chose twice, by itself and by name: with `twice` the mean of both stands
    for the latter.
    """
    known = instances()
    today = {tile_name(name): name for name in known}
    entries, multiprocessors = {}, MULTIPROCESSORS
    for path in paths:
        results = json.loads(path.read_text())
        for entry in results["configs"]:
            of = f"{path.name}, run {entry['run']}"
            key = (*(entry[name] for name in ("layer", "n", "k", "m", "dense")), of)
            entries[key, entry["config"]] = entry
            device = results["runs"][entry["run"]]["device"]
            multiprocessors = device.get("multiprocessors", multiprocessors)
    shapes = list(dict.fromkeys(key for key, _ in entries))
    number, names = {key: i for i, key in enumerate(shapes)}, list(known)
    rows, auto, own, timed = [], {}, {}, {}
    for (key, choice), entry in entries.items():
        name, _, mode = choice.partition(":")
        name = today.get(tile_name(name), name)
        if choice == "auto":
            auto[number[key]] = entry["us"]
            if twice and (by_name := entries.get((key, entry.get("choice")))):
                name, _, mode = entry["choice"].partition(":")
                both = (entry["us"] + by_name["us"]) / 2
                own[key, today.get(tile_name(name), name), mode] = both
        elif name in known:
            timed.setdefault(key, {"bytes": entry["packed_bytes"]})[name, mode] = entry["us"]
    for (key, *choice), us in own.items():
        if tuple(choice) in timed.get(key, ()):
            timed[key][tuple(choice)] = us
    for key, times in timed.items():
        _, n, k, m, *_ = key
        for at, (name, config) in enumerate(known.items()):
            facts = facts_of(config, n, k, m, times["bytes"], multiprocessors)
            for mode in MODES:
                us = times.get((name, mode), np.nan)
                rows.append((us, number[key], at, mode == "stream", *facts.values()))
    if not rows:
        raise SystemExit("refit: expected forced runs of today's configs, got none")
    columns = list(zip(*rows, strict=True))
    us, shape, config, stream = (np.array(c) for c in columns[:4])
    arrays = dict(zip(facts, (np.array(c, dtype=float) for c in columns[4:]), strict=True))
    return Runs(names, us, shape, config, stream, arrays, shapes, auto)
