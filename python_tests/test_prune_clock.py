# SPDX-License-Identifier: Apache-2.0
"""Seconds by phase: nothing counted twice, and a prune's phases make up its time."""

import time

import pytest

from spense_kernels.prune.clock import Clock, phase


def test_a_phase_does_not_count_what_runs_inside_it():
    clock = Clock("cpu")
    with clock, phase("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with phase("inner"):
                time.sleep(0.05)
    assert set(clock.seconds) == {"outer", "inner"}
    assert clock.seconds["inner"] >= 0.1
    assert 0.02 <= clock.seconds["outer"] < clock.seconds["inner"]


def test_no_clock_and_errors():
    with phase("nothing"):
        pass
    clock = Clock("cpu")
    with pytest.raises(ValueError, match="out"), clock, phase("a"), phase("b"):
        raise ValueError("out")
    with phase("later"):  # the clock has stopped
        pass
    assert set(clock.seconds) == {"a", "b"}


def test_phases_of_a_prune_add_up():
    pytest.importorskip("transformers")
    from prune_models import make, quick, tokens_for_calibration

    from spense_kernels.prune import collect_statistics, prune_model

    model, tokens = make("gemma3"), tokens_for_calibration()
    config = quick(strategy="staircase", correct=True, admm_steps=5)
    statistics = collect_statistics(model, tokens, config)
    assert set(statistics.seconds) == {"statistics", "sensitivity"}
    begin = time.monotonic()
    report = prune_model(model, tokens, config, statistics=statistics)
    taken = time.monotonic() - begin
    inside = {"row losses", "widths", "order search", "sweep", "refit", "mask search", "fp8"}
    inside |= {"dense model", "pruned model", "moments", "targets", "install", "losses"}
    assert inside <= set(report.phases) == set(report.to_json()["phases"])
    assert 0.7 * taken <= sum(report.phases.values()) <= taken
    assert sum(report.seconds.values()) <= taken
