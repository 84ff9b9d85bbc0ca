# SPDX-License-Identifier: Apache-2.0
"""Runs docs/examples as users do, each in a process of its own (vllm_offline.py: engines)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import save_tiny, write_text

from spense_kernels.checkpoint import verify_checkpoint

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("with_text", [False, True], ids=["magnitude", "calibrated"])
def test_prune_and_serve(tmp_path, with_text):
    dense = save_tiny(tmp_path / "dense")
    more = ("--text", write_text(tmp_path / "book.txt")) if with_text else ()
    out = tmp_path / "pruned"
    printed = run("prune_and_serve.py", dense, out, *more, "--prompt", "Paragraph 7")
    assert printed.startswith("Paragraph 7")
    assert verify_checkpoint(out).ok


def test_op_alone():
    assert "relative difference to plain torch" in run("op_alone.py")


def test_compile_and_export(tmp_path):
    printed = run("compile_and_export.py", tmp_path / "mlp.pt2")
    assert "torch.compile: one graph, the same bits" in printed
    assert "AOTInductor" in printed
    assert (tmp_path / "mlp.pt2").stat().st_size > 0


def test_every_example_is_run():
    text = "".join(
        path.read_text()
        for path in (Path(__file__), *(Path(__file__).parent / "engines").glob("test_*.py"))
    )
    assert [p.name for p in EXAMPLES.glob("*.py") if f'"{p.name}"' not in text] == []
