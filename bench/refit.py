# SPDX-License-Identifier: Apache-2.0
"""Fits the cost model of the SM90 kernels to forced runs, and says what its choices lose.

    python bench/gemm_sweep.py --configs all --json configs.json      # on a GPU
    python bench/refit.py configs.json                                # anywhere: regret as it is
    python bench/refit.py configs.json --fit --wander 30000 --seed 1 \
        --scale bench/results/gemm_h100.json --write                  # new constants into csrc

The formula is that of csrc/heuristics/cost.cpp; python_tests/test_refit.py holds both together.
First least squares in the logarithm of time, unless the constants that stand lose less; then random
steps to choices that lose less, where errors of runs that are close to one another decide; last all
times together to the level of a sweep's. Shapes with no part in the fit are HELD_OUT and UNSEEN of
gemm/shapes.py, or those that --hold-out names.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from gemm.cost_model import MULTIPROCESSORS, Model, Runs, estimates, number_text, read_runs
from gemm.regret import UNTIMED
from gemm.shapes import HELD_OUT, HUNGRY_TOKENS, MODELS, TOKENS, UNSEEN

NEAR = 1.5  # runs up to so many times the fastest of their shape teach the fit
# What a shape counts when choices are weighed: one that has a target, one of no model (these are
# few), and beside that one of many tokens, which takes longest.
TARGET_WEIGHT, OTHER_WEIGHT, MANY_WEIGHT, MANY_TOKENS = 3, 6, 2, 512
TARGET_DENSE = 0.25
DECODE_TOKENS = 64  # up to here a sweep's times are the level of estimates
BLURS = (0.01, 0.005)  # errors that a choice should not depend on, half of the steps each
SQUARES = 25  # so much of a regret's square beside itself, so that no shape is left far behind
ERRORS = 0.3  # and so much of the estimates' squared errors
FIRST_STEP, STEPS = 0.05, (0.003, 0.5)  # of a constant's logarithm, and its bounds


def least_of(runs: Runs) -> np.ndarray:
    """For every run the least time of its shape."""
    least = np.full(len(runs.shapes), np.inf)
    np.fmin.at(least, runs.shape, runs.us)
    return least[runs.shape]


def lost(runs: Runs) -> np.ndarray:
    """Time of every run over the least of its shape, less 1; UNTIMED of one that has no time."""
    return np.nan_to_num(runs.us / least_of(runs) - 1, nan=UNTIMED)


class Loss:
    """What the fit makes small: how far estimates of near runs are off, and what choices lose.

    A choice counts blurred, so that it has a margin.
    """

    def __init__(self, runs: Runs):
        number, at = np.unique(runs.shape, return_inverse=True)
        shapes = [runs.shapes[i] for i in number]
        tokens = np.array([shape[3] for shape in shapes])
        weight = np.array([weight_of(*shape[:5]) for shape in shapes])
        self.weight, self.at, self.shapes = weight / weight.sum(), at, len(number)
        self.runs, self.lost = runs, lost(runs)
        self.near = runs.us <= NEAR * least_of(runs)
        self.log_us = np.log(np.where(self.near, runs.us, 1))
        self.log_auto = np.log([runs.auto.get(i, np.nan) for i in number])
        self.level_weight = np.where(tokens < HUNGRY_TOKENS, 1.0, 0.05) / self.shapes

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Of every shape's runs."""
        return np.bincount(self.at, values, self.shapes)

    def least(self, values: np.ndarray) -> np.ndarray:
        least = np.full(self.shapes, np.inf)
        np.minimum.at(least, self.at, values)
        return least

    def errors(self, log: np.ndarray) -> np.ndarray:
        """Weighted logarithms of estimate over time: of near runs in a shape, then of shapes.

        A shape's level is that of the op's own choice, which ran among its like.
        """
        error = np.where(self.near, log - self.log_us, 0)
        mean = self.sum(error) / self.sum(self.near)
        inside = (error - mean[self.at])[self.near] / np.sqrt(self.near.sum())
        level = np.where(np.isnan(self.log_auto), mean, self.least(log) - self.log_auto)
        return np.concatenate([inside, np.sqrt(self.level_weight) * level])

    def __call__(self, model: Model, blur: float) -> float:
        log = np.log(self.runs.estimate(model))
        share = np.exp((self.least(log)[self.at] - log) / blur)
        regret = self.sum(share * self.lost) / self.sum(share)
        errors = self.errors(log)
        return float(self.weight @ (regret + SQUARES * regret**2) + ERRORS * (errors @ errors))


def weight_of(layer: str, n: int, k: int, m: int, dense: float) -> int:
    of_model = any(layer == of.label for layers in MODELS.values() for of in layers)
    weight = 1 if of_model else OTHER_WEIGHT
    if of_model and dense == TARGET_DENSE and m in TOKENS:
        weight = TARGET_WEIGHT
    return weight * (MANY_WEIGHT if m >= MANY_TOKENS else 1)


def fit(model: Model, runs: Runs, weight: float = 0.03) -> Model:
    """Least squares over the near runs.

    Constants are pulled to where they were, so that what the runs say nothing about stays.
    """
    of = Loss(runs)
    names = [runs.names[i] for i in np.unique(runs.config)]
    start = model.vector(names)

    def residuals(vector: np.ndarray) -> np.ndarray:
        error = of.errors(np.log(runs.estimate(model.with_vector(vector, names))))
        return np.concatenate([error, weight * (vector - start) / np.sqrt(len(runs.us))])

    return model.with_vector(minimise(residuals, start), names)


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


def better_start(model: Model, runs: Runs) -> Model:
    """The constants that stand or those of least squares, whichever lose less."""
    of = Loss(runs)
    return min(model, fit(model, runs), key=lambda m: of(m, BLURS[-1]))


def wander(model: Model, runs: Runs, tries: int, seed: int = 0) -> Model:
    """Random steps along one to three constants, kept where the loss is less.

    Each constant's steps grow where they are kept and shrink where they are not.
    """
    of, names, random = Loss(runs), list(model.config), np.random.default_rng(seed)
    x = model.vector(names)
    step = np.full(len(x), FIRST_STEP)
    for blur in BLURS:
        least = of(model.with_vector(x, names), blur)
        for _ in range(tries // len(BLURS)):
            tried, at = x.copy(), random.choice(len(x), random.integers(1, 4), replace=False)
            tried[at] += random.normal(0, step[at])
            value = of(model.with_vector(tried, names), blur)
            if kept := value < least - 1e-7:
                x, least = tried, value
            step[at] = np.clip(step[at] * (1.3 if kept else 0.97), *STEPS)
        step = np.maximum(step, FIRST_STEP / 2)
    return model.with_vector(x, names)


def scale(model: Model, sweep: dict) -> Model:
    """All times by one factor, so that those of a sweep's decode layers are met in the mean.

    Forced runs and a sweep's are no launches of the same kind; choices stay as they are.
    """
    ratios = []
    for p in sweep["points"]:
        if p["kind"] == "layer" and p["group"] and p["m"] <= DECODE_TOKENS:
            us = estimates(model, p["n"], p["k"], p["m"], p["packed_bytes"], MULTIPROCESSORS)
            ratios.append(p["times"]["spense"]["us"] / min(us.values()))
    return model.times(statistics.mean(ratios))


def chosen(model: Model, runs: Runs) -> np.ndarray:
    """The run with the least estimate, of every shape in the order of their numbers."""
    order = np.lexsort((runs.estimate(model), runs.shape))
    return order[np.r_[True, np.diff(runs.shape[order]) > 0]]


def regrets(model: Model, runs: Runs) -> dict[int, float]:
    """Of every shape: time of the run with the least estimate over the least time, less 1."""
    of = lost(runs)[chosen(model, runs)].tolist()
    return dict(zip(np.unique(runs.shape).tolist(), of, strict=True))


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
    parser.add_argument("--wander", type=int, default=0, help="random steps after a fit, 100 a s")
    parser.add_argument("--seed", type=int, default=0, help="of the random steps")
    parser.add_argument("--scale", type=Path, help="of gemm_sweep.py: bring estimates to its level")
    parser.add_argument("--write", action="store_true", help="the fitted constants into csrc")
    args = parser.parse_args()
    runs, model = read_runs(args.files), Model.read()
    out = np.array([f"{n}x{k}" in args.hold_out for _, n, k, *_ in runs.shapes])[runs.shape]
    models = {"as it is": model}
    if args.fit:
        taught = read_runs(args.files, twice=True).only(~out)
        fitted = wander(better_start(model, taught), taught, args.wander, args.seed)
        if args.scale:
            fitted = scale(fitted, json.loads(args.scale.read_text()))
        models["fitted"] = fitted = fitted.rounded()
    for title, of in models.items():
        for part, keep in (("listed", ~out), ("held out", out)):
            if keep.any():
                print(report(f"{title}, {part}", of, runs.only(keep)))
    if args.fit:
        print("  ".join(f"{name} {number_text(value)}" for name, value in fitted.device.items()))
        for name, costs in fitted.config.items():
            print(f"{name:<24}" + " ".join(f"{cost:8.3f}" for cost in costs))
        if args.write:
            fitted.write()


if __name__ == "__main__":
    main()
