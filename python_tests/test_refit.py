# SPDX-License-Identifier: Apache-2.0
"""bench/refit.py: its formula is the C++ one, and a fit finds constants that made the times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from spense_kernels import _C
from spense_kernels.format import Split

BENCH = Path(__file__).parents[1] / "bench"
SHAPES = [(10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600), (2112, 7168)]
TOKENS = [1, 16, 40, 64, 128, 200, 512, 1024, 4096]


@pytest.fixture
def refit(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import refit

    return refit


def results(model, noise: float = 0.0) -> dict:
    """A sweep's file in which every configuration takes what the model says."""
    from gemm.cost_model import MODES, estimate, facts_of, instances

    entries, chance = [], np.random.default_rng(0)
    for n, k in SHAPES:
        for d in (0.0, 0.25, 1.0):
            packed = Split.from_fraction(n, k, d).packed_bytes
            for m in TOKENS:
                shape = {"layer": f"{n}x{k}", "n": n, "k": k, "m": m, "dense": d, "run": 0}
                for name, config in instances().items():
                    facts = facts_of(config, n, k, m, packed, 132)
                    for mode in MODES:
                        us = estimate(model.device, *model.config[name], mode == "stream", facts)
                        us = float(us * np.exp(noise * chance.standard_normal()))
                        run = {"config": f"{name}:{mode}", "us": us, "packed_bytes": packed}
                        entries.append(shape | run)
    return {"runs": [{"device": {"multiprocessors": 132}}], "configs": entries}


def test_the_formula_is_that_of_the_product(refit, tmp_path):
    """The op's own choice is the run with the least estimate, in as many microseconds."""
    from gemm.cost_model import choice, instances

    model = refit.Model.read()
    assert list(model.config) == list(instances()) == _C.sm90.configs()
    file = tmp_path / "configs.json"
    file.write_text(json.dumps(results(model)))
    runs = refit.read_runs([file])
    estimates = runs.estimate(model)
    np.testing.assert_allclose(estimates, runs.us, rtol=1e-12)
    for number, (_, n, k, m, d, _) in enumerate(runs.shapes):
        found = _C.sm90.estimate(m, n, k, Split.from_fraction(n, k, d).packed_bytes)
        here = runs.shape == number
        assert estimates[here].min() == pytest.approx(found["us"], rel=1e-9)
        best = np.flatnonzero(here)[estimates[here].argmin()]
        mode = "stream" if runs.stream[best] else "whole"
        assert found["config"] == f"{runs.names[runs.config[best]]}:{mode}"
        packed = Split.from_fraction(n, k, d).packed_bytes
        assert choice(model, n, k, m, packed, 132) == found["config"]
    assert max(refit.regrets(model, runs).values()) == 0


def test_a_fit_finds_what_made_the_times(refit, tmp_path):
    truth = refit.Model.read()
    start = refit.Model(
        truth.device | {"kDramBytesPerUs": 2.2e6, "kZeroRowsNs": 3.0, "kLaunchUs": 3.0},
        {
            name: [sparse * (1.3, 0.8)[i % 2], dense * 1.2, tile + 2, fixup * 1.5]
            for i, (name, (sparse, dense, tile, fixup)) in enumerate(truth.config.items())
        },
    )
    file = tmp_path / "configs.json"
    file.write_text(json.dumps(results(truth, noise=0.01)))
    runs = refit.read_runs([file])
    fitted = refit.fit(start, runs)
    before, after = refit.regrets(start, runs), refit.regrets(fitted, runs)
    assert max(before.values()) > 0.1
    assert max(after.values()) < 0.05
    assert sum(after.values()) / len(after) < 0.01
    assert fitted.device["kDramBytesPerUs"] == pytest.approx(
        truth.device["kDramBytesPerUs"], rel=0.1
    )


def test_written_constants_are_read_again(refit, tmp_path, monkeypatch):
    from gemm import cost_model

    for name in ("COSTS", "FORMULA"):
        copy = tmp_path / getattr(cost_model, name).name
        copy.write_text(getattr(cost_model, name).read_text())
        monkeypatch.setattr(cost_model, name, copy)
    model = refit.Model.read()
    model.device["kL2BytesPerUs"] = 9.87e6
    model.device["kReread"] = 0.123
    model.config[next(iter(model.config))] = [0.3214, 0.234, 4.5, 6.754]
    model.write()
    assert refit.Model.read() == model.rounded() != model


def test_regret_from_the_command_line(refit, tmp_path, monkeypatch, capsys):
    file = tmp_path / "configs.json"
    file.write_text(json.dumps(results(refit.Model.read(), noise=0.02)))
    monkeypatch.setattr(sys, "argv", ["refit", str(file)])
    refit.main()
    text = capsys.readouterr().out
    assert "as it is, listed: 108 shapes, regret mean" in text
    assert "as it is, held out: 27 shapes" in text


def test_wandering_loses_no_more_than_before(refit, tmp_path):
    truth = refit.Model.read()
    file = tmp_path / "configs.json"
    file.write_text(json.dumps(results(truth, noise=0.01)))
    runs = refit.read_runs([file])
    start = refit.Model(truth.device | {"kExponent": 1.2}, truth.config)
    before, after = (
        sum(refit.regrets(refit.wander(start, runs, tries), runs).values()) for tries in (0, 300)
    )
    assert after < 0.8 * before


def test_a_fit_takes_the_mean_of_what_the_op_chose_and_the_same_by_name(refit, tmp_path):
    from gemm import cost_model

    made = results(refit.Model.read())
    for m, slower in ((16, 1.1), (64, 1.01)):
        run = next(e for e in made["configs"] if e["m"] == m)
        made["configs"].append(run | {"config": "auto", "choice": run["config"]})
        run["us"] *= slower
    file = tmp_path / "configs.json"
    file.write_text(json.dumps(made))
    once, twice = (cost_model.read_runs([file], twice) for twice in (False, True))
    changed = np.flatnonzero(once.us != twice.us)
    assert sorted(once.shapes[once.shape[i]][3] for i in changed) == [16, 64]
    for i in changed:
        slower = {16: 1.1, 64: 1.01}[once.shapes[once.shape[i]][3]]
        np.testing.assert_allclose(twice.us[i], once.us[i] * (1 + 1 / slower) / 2)
    assert len(twice.auto) == 2


def test_scaled_estimates_meet_a_sweep_and_choose_the_same(refit):
    from gemm.cost_model import choice, estimates

    model, points = refit.Model.read(), []
    for n, k in SHAPES:
        packed = Split.from_fraction(n, k, 0.25).packed_bytes
        us = min(estimates(model, n, k, 16, packed, 132).values())
        shape = {"n": n, "k": k, "m": 16, "packed_bytes": packed}
        times = {"spense": {"us": 1.25 * us}}
        points.append(shape | {"kind": "layer", "group": "a", "times": times})
        points.append(points[-1] | {"m": 4096, "times": {"spense": {"us": 1.0}}})  # no part in it
    scaled = refit.scale(model, {"points": points})
    for p in points:
        of = [p[name] for name in ("n", "k", "m", "packed_bytes")]
        before, after = (estimates(any_model, *of, 132) for any_model in (model, scaled))
        assert after == pytest.approx({name: 1.25 * us for name, us in before.items()})
        assert choice(model, *of, 132) == choice(scaled, *of, 132)


def test_problems_with_a_target_count_most(refit):
    assert refit.weight_of("qwen3-32b.o", 5120, 8192, 64, 0.25) == refit.TARGET_WEIGHT
    assert refit.weight_of("qwen3-32b.o", 5120, 8192, 48, 0.25) == 1
    assert refit.weight_of("qwen3-32b.o", 5120, 8192, 64, 0.5) == 1
    assert refit.weight_of("2112x7168", 2112, 7168, 48, 0.25) == refit.OTHER_WEIGHT
    many = refit.weight_of("qwen3-32b.o", 5120, 8192, 1024, 0.25)
    assert many == refit.TARGET_WEIGHT * refit.MANY_WEIGHT
