# SPDX-License-Identifier: Apache-2.0
"""Marks and skips, fixed seeds, one hypothesis profile."""

from __future__ import annotations

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --slow"))


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
