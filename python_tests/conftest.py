# SPDX-License-Identifier: Apache-2.0
"""Marks and skips, fixed seeds, one hypothesis profile, results written as they come."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from spense_kernels import _load

# The same examples on every run; HYPOTHESIS_PROFILE=random looks further.
settings.register_profile(
    "fixed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("random", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")
    parser.addoption("--results", help="file where tests of an engine write what they saw")
    parser.addoption("--demo-checkpoint", help="pruned Gemma of `spense demo`, for engines' tests")


def why_no_gpu() -> str | None:
    """None where the CUDA ops can run, else the reason for a skip."""
    return _load.why_no_cuda() or (None if torch.cuda.is_available() else "no CUDA device here")


def pytest_configure(config: pytest.Config) -> None:
    # On a GPU the CPU only makes small operands. A thread a core costs more than it brings there,
    # by far where a container has fewer cores than it sees.
    if torch.cuda.is_available():
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --slow"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Appends a line of JSON for every test to the file that SPENSE_TEST_LOG names, at once: a run
    that is cut short keeps what it found."""
    path = os.environ.get("SPENSE_TEST_LOG")
    if not path or (report.when != "call" and report.passed):
        return
    entry = {"test": report.nodeid, "outcome": report.outcome, "s": round(report.duration, 3)}
    entry |= dict(report.user_properties)
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        entry["message"] = (crash.message if crash else str(report.longrepr))[:600]
    with open(path, "a", encoding="utf-8") as log:
        log.write(json.dumps(entry) + "\n")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Of the pruner's tests. prune_models needs transformers, which not every test has.
@pytest.fixture(scope="module")
def tokens():
    from prune_models import tokens_for_calibration

    return tokens_for_calibration()


@pytest.fixture(scope="module")
def gemma():
    from prune_models import make

    return make("gemma3")


@pytest.fixture(scope="module")
def gemma_statistics(gemma, tokens):
    from prune_models import quick

    from spense_kernels.prune import collect_statistics

    return collect_statistics(gemma, tokens, quick(strategy="staircase"))
