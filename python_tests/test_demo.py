# SPDX-License-Identifier: Apache-2.0
"""The demo's report: JSON, table and picture, from small made-up results."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spense_kernels.demo import plot, report
from spense_kernels.demo.settings import DemoSettings
from spense_kernels.demo.steps import Steps

KINDS = {"q_proj": 64, "down_proj": 96}


def fake_report():
    def method(key, label, ppl, above, dense, kept, size):
        return {
            "key": key,
            "label": label,
            "ppl": ppl,
            "ppl_stderr": 0.1 * ppl,
            "nll": math.log(ppl),
            "stderr": 0.1,
            "tokens": 8176,
            "above_original": above,
            "dense_fraction": dense,
            "kept_fraction": kept,
            "linear_bytes_per_token": size,
            "model_bytes_per_token": size + 335_544_320,
        }

    return {
        "report": "spense demo",
        "version": report.REPORT_VERSION,
        "model": {"name": "fake", "lm_head_bytes": 335_544_320},
        "text": {
            "name": "a text",
            "calibration_tokens": 32704,
            "test_tokens": 8176,
            "window": 512,
        },
        "settings": {"dense_fraction": 0.25, "method": "obs", "strategy": "uniform"},
        "methods": [
            method("original", "original", 14.5, None, 1.0, 1.0, 200_000_000),
            method("fp8", "FP8 dense", 14.8, {"nll": 0.02, "stderr": 0.002}, 1.0, 1.0, 101e6),
            method("sparse", "pure 2:4", 40.0, {"nll": 1.0, "stderr": 0.03}, 0.0, 0.5, 64e6),
            method("hybrid", "hybrid", 18.0, {"nll": 0.2, "stderr": 0.01}, 0.25, 0.625, 73e6),
        ],
        "layers": [
            {
                "name": f"model.layers.{i}.{kind}",
                "kind": kind,
                "index": i,
                "n": 128,
                "k": k,
                "rel_error": 0.01 * (i + 1),
                "dense_map": [0.0] * 48 + [1.0] * 16,
            }
            for i in range(3)
            for kind, k in KINDS.items()
        ],
        "continuations": [
            {"prompt": "Once", "original": " upon\na time", "hybrid": " upon a hill"}
        ],
        "ops": {"layers": 6, "calls": 132, "expected_calls": 132},
        "total_seconds": 321.0,
        "peak_memory_bytes": 4_200_000_000,
    }


def test_json_round_trip_one_line_a_record(tmp_path):
    path = tmp_path / "report.json"
    made = fake_report()
    report.write_json(made, path)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == made
    assert list(tmp_path.iterdir()) == [path]
    assert len(text.splitlines()) < 60


def test_json_refuses_nan_and_leaves_nothing(tmp_path):
    made = fake_report()
    made["methods"][0]["ppl"] = float("nan")
    with pytest.raises(ValueError):
        report.write_json(made, tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_table_names_every_method_with_its_error():
    text = report.table(fake_report())
    lines = text.splitlines()
    assert len(lines) == 6
    assert "14.50 ± 1.45" in lines[2]
    assert "1.000 ± 0.030" in lines[4]
    assert "62.5%" in lines[5]
    assert "73.0 MB" in lines[5]
    assert "408.5 MB" in lines[5]


def test_table_with_one_window_has_no_error():
    made = fake_report()
    made["methods"][0]["ppl_stderr"] = None
    made["methods"][1]["above_original"] = {"nll": 0.02, "stderr": None}
    assert "±" not in report.table(made).splitlines()[2]
    plot_bars = [m["ppl_stderr"] or 0.0 for m in made["methods"]]
    assert plot_bars[0] == 0.0


def test_summary_shows_both_continuations_on_one_line_each():
    text = report.summary(fake_report())
    assert "original: upon a time" in text
    assert "hybrid:   upon a hill" in text
    assert "132 calls of torch.ops.spense.hybrid_gemm" in text


def test_picture(tmp_path):
    path = tmp_path / "report.png"
    plot.write_png(fake_report(), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 20_000
    assert list(tmp_path.iterdir()) == [path]


def test_short_is_the_same_demo_with_less_text():
    full, short = DemoSettings.preset(False), DemoSettings.preset(True)
    assert full.test_windows * (full.length - 1) >= 8000
    assert short.test_windows < full.test_windows
    assert short.calibration_windows < full.calibration_windows
    assert short.model == full.model
    assert short.dense_fraction == full.dense_fraction


def test_the_whole_way_on_a_tiny_model(tmp_path, capfd):
    """Same path as the real demo: three prunes, a checkpoint, a new process, a report."""
    from tiny_model import save_tiny, write_text

    from spense_kernels.cli.app import app

    model = save_tiny(tmp_path / "model")
    text = write_text(tmp_path / "text.txt")
    out = tmp_path / "out"
    args = ["demo", "--short", "--model", str(model), "--text", str(text), "--out", str(out)]
    done = CliRunner().invoke(app, [*args, "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == made
    assert (out / "report.png").stat().st_size > 20_000
    by_key = {m["key"]: m for m in made["methods"]}
    assert list(by_key) == ["original", "fp8", "sparse", "hybrid"]
    assert by_key["fp8"]["dense_fraction"] == 1.0
    assert by_key["sparse"]["dense_fraction"] == 0.0
    assert 0.2 < by_key["hybrid"]["dense_fraction"] < 0.3
    assert all(m["tokens"] == 4 * 511 for m in made["methods"])
    # Random weights predict next to nothing, so only a broken path would move the loss far.
    assert all(abs(m["above_original"]["nll"]) < 0.1 for m in made["methods"][1:])
    # 4 windows and up to 2 x 12 generated tokens, 14 layers each.
    assert made["ops"]["calls"] == made["ops"]["expected_calls"]
    assert 4 * 14 < made["ops"]["calls"] <= (4 + 2 * 12) * 14
    assert len(made["layers"]) == 14
    assert made["peak_memory_bytes"] > 100_000_000
    again = CliRunner().invoke(app, args)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    (out / "checkpoint" / "config.json").unlink()
    kept = CliRunner().invoke(app, [*args, "--force"])
    assert kept.exit_code == 2
    assert "holds no spense checkpoint" in kept.stderr


def test_dense_map_marks_the_columns_that_stayed_dense():
    import torch

    from spense_kernels.demo.layers import dense_map
    from spense_kernels.format import Split

    # Two tiles (128 and 72 rows): the first keeps 16 columns of each shard dense, the second 32.
    perm = torch.stack([torch.arange(64).flip(0), torch.arange(64)]).int()
    split = Split(200, 128, perm, torch.tensor([16, 32], dtype=torch.int32))
    expected = [0.0] * 128
    for shard, columns in ((0, range(32)), (1, range(96, 128))):
        for place, column in enumerate(columns):
            both = place < 16 if shard == 0 else place >= 16
            expected[column] = 1.0 if both else round(72 / 200, 3)
    assert dense_map(split, bins=128) == expected
    assert dense_map(split, bins=2) == [round((16 + 16 * 0.36) / 64, 3)] * 2


def test_steps_count_a_child_on_top_of_the_parent(capsys):
    steps = Steps(total=2)
    with steps.step("first"):
        pass
    steps.child(peak_bytes=1 << 50, own_bytes=1)
    assert steps.peak_bytes == (1 << 50) + 1
    assert list(steps.seconds) == ["first"]
    assert "[1/2] first" in capsys.readouterr().err


def test_the_readme_shows_the_committed_results():
    script = Path(__file__).parent.parent / "bench" / "readme.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
