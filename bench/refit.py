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
import statistics
from pathlib import Path

import numpy as np
from gemm.cost_model import Model, Runs, number_text, read_runs
from gemm.regret import UNTIMED
from gemm.shapes import HELD_OUT, HUNGRY_TOKENS, UNSEEN

NEAR = 1.5  # runs up to so many times the fastest of their shape teach the fit
MANY_TOKENS, MANY_WEIGHT = 512, 10  # shapes from here on are few, and take longest
STEPS = (0.1, 0.03, 0.01)  # of a constant's logarithm
BLUR = 0.01  # errors of estimates that a choice should not depend on
MARGIN, MOST_LOST = 0.01, 0.3  # a slower run's estimate should be so much more; of its regret


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
    counts by how much less its estimate is than that of the fastest. Each run's shapes together
    count as the root of their number, those of many tokens MANY_WEIGHT times.
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


def wander(model: Model, runs: Runs, tries: int, seed: int = 0) -> Model:
    """Random steps along one to three constants, kept where less is lost by choices alone."""
    names, of, random = list(model.config), lost(runs), np.random.default_rng(seed)
    tokens = np.array([runs.shapes[shape][3] for shape in np.unique(runs.shape)])

    def loss(vector: np.ndarray) -> float:
        regret = of[chosen(model.with_vector(vector, names), runs)]
        return float(np.mean(regret + 4 * regret**2) + 5 * np.sum(regret[tokens >= MANY_TOKENS])
                     / max(1, np.sum(tokens >= MANY_TOKENS)))  # fmt: skip

    x = model.vector(names)
    least = loss(x)
    for _ in range(tries):
        tried, at = x.copy(), random.choice(len(x), random.integers(1, 4), replace=False)
        tried[at] += random.normal(0, random.choice([0.01, 0.03, 0.08]), len(at))
        if (value := loss(tried)) < least - 1e-7:
            x, least = tried, value
    return model.with_vector(x, names)


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
    parser.add_argument("--write", action="store_true", help="the fitted constants into csrc")
    args = parser.parse_args()
    runs, model = read_runs(args.files), Model.read()
    out = np.array([f"{n}x{k}" in args.hold_out for _, n, k, *_ in runs.shapes])[runs.shape]
    models = {"as it is": model}
    if args.fit:
        models["fitted"] = wander(fit(model, runs.only(~out)), runs.only(~out), args.wander)
    for title, of in models.items():
        for part, keep in (("listed", ~out), ("held out", out)):
            if keep.any():
                print(report(f"{title}, {part}", of, runs.only(keep)))
    if args.fit:
        fitted = models["fitted"]
        print("  ".join(f"{name} {number_text(value)}" for name, value in fitted.device.items()))
        for name, costs in fitted.config.items():
            print(f"{name:<24}" + " ".join(f"{cost:8.3f}" for cost in costs))
        if args.write:
            fitted.write()


if __name__ == "__main__":
    main()
