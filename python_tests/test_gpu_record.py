# SPDX-License-Identifier: Apache-2.0
"""python_tests/gpu_record.py: the record of a run of the GPU tests."""

from __future__ import annotations

import json

from gpu_record import outcomes_by_file


def test_the_last_outcome_counts_and_failures_keep_their_words():
    runs = [
        ("a.py::one", "failed", "argument given twice"),
        ("a.py::two", "passed", None),
        ("b.py::three", "failed", "not equal"),
        ("b.py::four", "skipped", None),
        ("a.py::one", "passed", None),
    ]
    lines = [
        json.dumps({"test": test, "outcome": outcome} | ({"message": words} if words else {}))
        for test, outcome, words in runs
    ]
    assert outcomes_by_file(lines) == {
        "a.py": {"passed": 2, "failed": 0, "skipped": 0},
        "b.py": {
            "passed": 0,
            "failed": 1,
            "skipped": 1,
            "failures": {"b.py::three": "not equal"},
        },
    }
