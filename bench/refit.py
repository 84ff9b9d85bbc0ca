# SPDX-License-Identifier: Apache-2.0
"""Fits the cost model of the SM90 kernels to forced runs, and says what its choices lose.

    python bench/gemm_sweep.py --configs all --json configs.json      # on a GPU
    python bench/refit.py configs.json                                # anywhere: regret as it is
    python bench/refit.py configs.json --fit --write                  # new constants into csrc

The formula is that of csrc/heuristics/cost.cpp; python_tests/test_refit.py holds both together.
First least squares in the logarithm of time, then a search along each constant for less regret,
which the errors of runs that are close to one another decide. Shapes with no part in the fit are
HELD_OUT and UNSEEN of gemm/shapes.py, or those that --hold-out names.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gemm import kernels
from gemm.regret import UNTIMED
from gemm.shapes import HELD_OUT, UNSEEN

from spense_kernels.layout import BLOCK_BYTES, DENSE_UNIT_COLUMNS, TILE_ROWS, ceil_div, padded_k

HEURISTICS = Path(__file__).resolve().parents[1] / "csrc" / "heuristics"
COSTS, FORMULA = HEURISTICS / "sm90_costs.def", HEURISTICS / "cost.cpp"
# Constants of the device in cost.cpp, in the order of a parameter vector.
DEVICE = ("kDramBytesPerUs", "kL2BytesPerUs", "kLaunchUs", "kStreamLaunch", "kExponent")
DEVICE += ("kReread", "kEmpty", "kSpread", "kCompany")
L2_BYTES = 40e6
OF_CONFIG = ("sparse", "dense", "tile", "fix-up")  # microseconds, in sm90_costs.def
NEAR = 1.5  # runs up to so many times the fastest of their shape teach the fit
HUNGRY_TOKENS = 1000  # from here on clocks fall, which slows all runs of a shape
MANY_TOKENS, MANY_WEIGHT = 512, 10  # shapes from here on are few, and take longest
STEPS = (0.1, 0.03, 0.01)  # of a constant's logarithm
LEAST = 0.05  # of any constant, which is fitted as a logarithm
BLUR = 0.01  # errors of estimates that a choice should not depend on
MARGIN, MOST_LOST = 0.01, 0.3  # a slower run's estimate should be so much more; of its regret
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Config:
    row_tiles: int
    tokens: int
    cluster_rows: int
    splits: int

    def tile_tokens(self, m: int) -> int:
        """As heuristics::tile_tokens of csrc/heuristics/gemm.h."""
        tiles = ceil_div(m, self.tokens)
        if tiles == 1 and self.cluster_rows == 1:
            return m
        own = 8 * ceil_div(self.tokens // 8, self.splits)
        store = 32 if own % 32 == 0 else 16 if own % 16 == 0 else 8
        return ceil_div(ceil_div(m, tiles), unit := max(8 * self.cluster_rows, store)) * unit

    def slots(self, multiprocessors: int) -> int:
        """Clusters at a time, as gemm.cpp guesses them where no device can be asked."""
        size = self.cluster_rows * self.splits
        return max(1, multiprocessors // size * (10 if size > 2 else 11) // 11)


def instances() -> dict[str, Config]:
    return {name: Config(*numbers[:4]) for name, numbers in kernels.instances().items()}


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
            text = re.sub(rf"\b({name} = )[\d.e+]+", lambda m, v=value: m[1] + _number(v), text)
        FORMULA.write_text(text)
        table = COSTS.read_text()
        for name, (sparse, dense, tile, fixup) in self.config.items():
            row = f"COST({name + ',':<22} {sparse:.3f}, {dense:.3f}, {tile:>5.2f}, {fixup:>5.2f})"
            table = re.sub(rf"^COST\({name},[^)]*\)", row, table, flags=re.MULTILINE)
        COSTS.write_text(table)

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


def _number(value: float) -> str:
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
    shapes: list[tuple] = field(default_factory=list)  # (layer, n, k, m, dense, file)
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
    size = config.cluster_rows * config.splits
    return {
        "sparse": sparse / config.splits,
        "dense": (blocks - 2 * sparse) / config.splits,
        "rounds": ceil_div(row_tiles, config.row_tiles * config.cluster_rows)
        * token_tiles
        / config.slots(multiprocessors),
        "tickets": size == 1,
        "company": size - 1 if token_tiles > 1 else 0,
        "token_tiles": token_tiles,
        "filled": config.tile_tokens(m) / config.tokens,
        "once": packed_bytes + m * k + 2 * m * n,
        "operands": packed_bytes + m * k,
        "l2": packed_bytes * token_tiles + x_rows * k / config.cluster_rows,
    }


def estimate(device: dict, sparse, dense, tile, fixup, stream, facts: dict) -> np.ndarray:
    rounds, token_tiles = facts["rounds"], facts["token_tiles"]
    units_us = facts["sparse"] * sparse + facts["dense"] * dense
    units_us = units_us * (1 - device["kEmpty"] * (1 - facts["filled"]))
    full = np.ceil(rounds)
    cut = rounds * units_us + full * tile + fixup
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
    return us + device["kLaunchUs"] * np.where(stream, device["kStreamLaunch"], 1)


def tile_name(config: str) -> str:
    """A config's name without its rings: runs of a build with other depths count as today's."""
    return re.sub(r"_s\d+x\d+", "", config)


def read_runs(paths: list[Path]) -> Runs:
    """The `configs` of sweep files. Unknown configs are left out.

    A problem of two files is two problems: times of one run compare, those of two hardly.
    """
    known = instances()
    today = {tile_name(name): name for name in known}
    entries, multiprocessors = {}, MULTIPROCESSORS
    for path in paths:
        results = json.loads(path.read_text())
        for entry in results["configs"]:
            key = (*(entry[name] for name in ("layer", "n", "k", "m", "dense")), path.name)
            entries[key, entry["config"]] = entry
            device = results["runs"][entry["run"]]["device"]
            multiprocessors = device.get("multiprocessors", multiprocessors)
    shapes = list(dict.fromkeys(key for key, _ in entries))
    number, names = {key: i for i, key in enumerate(shapes)}, list(known)
    rows, auto, timed = [], {}, {}
    for (key, choice), entry in entries.items():
        name, _, mode = choice.partition(":")
        name = today.get(tile_name(name), name)
        if choice == "auto":
            auto[number[key]] = entry["us"]
        elif name in known:
            timed.setdefault(key, {"bytes": entry["packed_bytes"]})[name, mode] = entry["us"]
    for key, times in timed.items():
        _, n, k, m, *_ = key
        for at, (name, config) in enumerate(known.items()):
            facts = facts_of(config, n, k, m, times["bytes"], multiprocessors)
            for mode in ("whole",) if config.splits > 1 else ("whole", "stream"):
                us = times.get((name, mode), np.nan)
                rows.append((us, number[key], at, mode == "stream", *facts.values()))
    if not rows:
        raise SystemExit("refit: expected forced runs of today's configs, got none")
    columns = list(zip(*rows, strict=True))
    us, shape, config, stream = (np.array(c) for c in columns[:4])
    arrays = dict(zip(facts, (np.array(c, dtype=float) for c in columns[4:]), strict=True))
    return Runs(names, us, shape, config, stream, arrays, shapes, auto)


def least_of(runs: Runs) -> np.ndarray:
    """For every run the least time of its shape."""
    least = np.full(len(runs.shapes), np.inf)
    np.fmin.at(least, runs.shape, runs.us)
    return least[runs.shape]


def lost(runs: Runs) -> np.ndarray:
    """Time of every run over the least of its shape, less 1; UNTIMED of one that has no time."""
    return np.nan_to_num(runs.us / least_of(runs) - 1, nan=UNTIMED)


class Loss:
    """What the fit makes small: what choices lose, and how far estimates of near runs are off.

    A choice counts blurred, so that it has a margin; its square as well, so that no shape is left
    far behind. So that a wrong order of two runs that are far apart is felt too, each slower run
    counts by how much less its estimate is than that of the fastest. Each file's shapes together
    count as the root of their number.
    """

    def __init__(self, runs: Runs):
        number, at = np.unique(runs.shape, return_inverse=True)
        files = [runs.shapes[i][-1] for i in number]
        tokens = np.array([runs.shapes[i][3] for i in number])
        weight = np.array([files.count(file) ** -0.5 for file in files])
        weight = weight * np.where(tokens >= MANY_TOKENS, MANY_WEIGHT, 1)
        self.weight, self.at, self.shapes = weight / weight.sum(), at, len(number)
        self.runs, self.lost = runs, lost(runs)
        fastest = np.flatnonzero(runs.us == least_of(runs))
        self.fastest = np.zeros(self.shapes, int)
        self.fastest[at[fastest]] = fastest
        self.near = runs.us <= NEAR * least_of(runs)
        self.log_us = np.log(np.where(self.near, runs.us, 1))
        self.log_auto = np.log([runs.auto.get(i, np.nan) for i in number])
        self.level_weight = np.where(tokens < HUNGRY_TOKENS, 1.0, 0.05) / self.shapes

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Of every shape's runs."""
        return np.bincount(self.at, values, self.shapes)

    def errors(self, model: Model) -> np.ndarray:
        """Weighted logarithms of estimate over time: of near runs in a shape, then of shapes.

        A shape's level is that of the op's own choice, which ran among its like.
        """
        error = np.where(self.near, np.log(self.runs.estimate(model)) - self.log_us, 0)
        mean = self.sum(error) / self.sum(self.near)
        inside = (error - mean[self.at])[self.near] / np.sqrt(self.near.sum())
        least = np.full(self.shapes, np.inf)
        np.minimum.at(least, self.at, np.log(self.runs.estimate(model)))
        level = np.where(np.isnan(self.log_auto), mean, least - self.log_auto)
        return np.concatenate([inside, np.sqrt(self.level_weight) * level])

    def __call__(self, model: Model) -> float:
        log = np.log(self.runs.estimate(model))
        least = np.full(self.shapes, np.inf)
        np.minimum.at(least, self.at, log)
        share = np.exp((least[self.at] - log) / BLUR)
        regret = self.sum(share * self.lost) / self.sum(share)
        gap = np.maximum(0, MARGIN + log[self.fastest][self.at] - log)
        order = self.sum(np.minimum(self.lost, MOST_LOST) * gap)
        errors = self.errors(model)
        return float(self.weight @ (regret + 40 * regret**2 + order) + errors @ errors)


def fit(model: Model, runs: Runs, weight: float = 0.03) -> Model:
    """Least squares over the near runs, then the search; the better of both starts of it.

    Constants are pulled to where they were, so that what the runs say nothing about stays.
    """
    of = Loss(runs)
    names = [runs.names[i] for i in np.unique(runs.config)]
    start = model.vector(names)

    def residuals(vector: np.ndarray) -> np.ndarray:
        error = of.errors(model.with_vector(vector, names))
        return np.concatenate([error, weight * (vector - start) / np.sqrt(len(runs.us))])

    def loss(vector: np.ndarray) -> float:
        pull = weight * (vector - start)
        return of(model.with_vector(vector, names)) + float(pull @ pull)

    found = [search(loss, vector) for vector in (start, minimise(residuals, start))]
    return model.with_vector(min(found, key=loss), names)


def search(loss, start: np.ndarray) -> np.ndarray:
    """Coordinate search with smaller and smaller steps."""
    x, least = start.copy(), loss(start)
    for step in STEPS:
        better = True
        while better:
            better = False
            for at in range(len(x)):
                for move in (step, -step):
                    tried = x.copy()
                    tried[at] += move
                    if (value := loss(tried)) < least - 1e-6:
                        x, least, better = tried, value, True
    return x


def minimise(residuals, start: np.ndarray, steps: int = 200) -> np.ndarray:
    """Levenberg-Marquardt with a numerical Jacobian."""
    x, damping = start.copy(), 1e-3
    r = residuals(x)
    for _ in range(steps):
        jacobian = np.stack([(residuals(x + h) - r) / 1e-5 for h in np.eye(len(x)) * 1e-5], axis=1)
        gradient, normal = jacobian.T @ r, jacobian.T @ jacobian
        step = -np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), gradient)
        step = np.clip(step, -1, 1)
        new = residuals(x + step)
        if new @ new < r @ r:
            gained = 1 - (new @ new) / (r @ r)
            x, r, damping = x + step, new, damping / 3
            if gained < 1e-7:
                break
        else:
            damping *= 4
            if damping > 1e9:
                break
    return x


def regrets(model: Model, runs: Runs) -> dict[int, float]:
    """Of every shape: time of the run with the least estimate over the least time, less 1."""
    estimates, of, found = runs.estimate(model), lost(runs), {}
    for shape in np.unique(runs.shape):
        here = np.flatnonzero(runs.shape == shape)
        found[int(shape)] = float(of[here[estimates[here].argmin()]])
    return found


def report(title: str, model: Model, runs: Runs) -> str:
    found = regrets(model, runs)
    error = np.abs(np.log(runs.estimate(model) / runs.us))[~np.isnan(runs.us)]
    worst = sorted(found.items(), key=lambda item: -item[1])[:5]
    lines = [
        f"{title}: {len(found)} shapes, regret mean {statistics.mean(found.values()):.2%}, worst "
        f"{max(found.values()):.2%}, above 3 % {sum(v > 0.03 for v in found.values())}, above 8 % "
        f"{sum(v > 0.08 for v in found.values())}; median error of estimates {np.median(error):.1%}"
    ]
    for shape, regret in worst:
        layer, _, _, m, dense, _ = runs.shapes[shape]
        lines.append(f"  {layer:<22} M = {m:<5} {dense:.1%} dense: {regret:.1%}")
    taken = [
        us / np.nanmin(runs.us[runs.shape == s]) - 1 for s, us in runs.auto.items() if s in found
    ]
    if taken:
        mean, most = statistics.mean(taken), max(taken)
        lines.append(f"  as measured, the op's own choices: mean {mean:.2%}, worst {most:.2%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="of gemm_sweep.py --configs all")
    left_out = [f"{n}x{k}" for n, k in (*HELD_OUT, *UNSEEN)]
    parser.add_argument("--hold-out", nargs="*", default=left_out)
    parser.add_argument("--fit", action="store_true", help="fit the constants anew")
    parser.add_argument("--write", action="store_true", help="the fitted constants into csrc")
    args = parser.parse_args()
    runs, model = read_runs(args.files), Model.read()
    out = np.array([f"{n}x{k}" in args.hold_out for _, n, k, *_ in runs.shapes])[runs.shape]
    models = {"as it is": model}
    if args.fit:
        models["fitted"] = fit(model, runs.only(~out))
    for title, of in models.items():
        for part, keep in (("listed", ~out), ("held out", out)):
            if keep.any():
                print(report(f"{title}, {part}", of, runs.only(keep)))
    if args.fit:
        fitted = models["fitted"]
        print("  ".join(f"{name} {_number(value)}" for name, value in fitted.device.items()))
        for name, costs in fitted.config.items():
            print(f"{name:<24}" + " ".join(f"{cost:8.3f}" for cost in costs))
        if args.write:
            fitted.write()


if __name__ == "__main__":
    main()
