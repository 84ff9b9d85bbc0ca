# SPDX-License-Identifier: Apache-2.0
"""bench/counters.py: which points it counts, what it reads from Nsight Compute, its table."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
KERNEL = (
    "void spense::sm90::hybrid_gemm<spense::sm90::Traits<(int)1, (int)16, (int)1, (int)8, "
    "(int)13, (int)2, (bool)1>>(spense::sm90::Params)"
)
NVJET = "nvjet_sm90_qqtst_80x64_128x11_1x2_h_bz_TNN"
COLUMNS = [
    "gpu__time_duration.sum",
    "sm__cycles_elapsed.max",
    "sm__cycles_elapsed.avg.per_second",
    "sm__cycles_active.avg",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "l1tex__m_xbar2l1tex_read_bytes.sum",
    "l1tex__m_l1tex2xbar_write_bytes.sum",
    "lts__t_bytes.sum",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum.pct_of_peak_sustained_elapsed",
]
N, K = 5120, 8192  # qwen3-32b.o
# 10 us at 1.5 GHz, half the port, a tenth of L2's bytes are sums of cut tiles
OURS = [10000, 15000, 1.5e9, 12000, 30.5, 64 * 15000 * 132 // 2, 2 * N + 5_000_000, 100_000_000]
OURS += [55, 85]
LISTING = "\n".join(f"{name.partition('.')[0]}   Counter   # of something" for name in COLUMNS)


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def csv_row(number: int, kernel: str, values: list[float]) -> str:
    return ",".join(f'"{word}"' for word in (number, 1, kernel, *(f"{v:,}" for v in values)))


def log() -> str:
    head = ",".join(f'"{word}"' for word in ("ID", "Process ID", "Kernel Name", *COLUMNS))
    units = ",".join('""' for _ in range(3 + len(COLUMNS)))
    rival = [5000.0, 7500.0, 1.5e9, 7000.0, 20.0, 64 * 7500 * 132 // 4, 10, 10, 30.0, 40.0]
    rows = [(KERNEL, OURS), (NVJET, rival), ("splitK_reduce", rival)]
    lines = ["==PROF== Connected", head, units, *(csv_row(i, *r) for i, r in enumerate(rows))]
    return "\n".join([*lines, "==PROF== Disconnected", ""])


def sweep(us: float = 12.0) -> dict:
    """One layer that misses its 1.35 x cuBLASLt with 1.25, and one that reaches it."""
    points = []
    for name, took in (("o", us), ("qkv", 10.0)):
        times = {"spense": took, "cublas_tensor": 16.0, "cublas_row": 15.0}
        point = {"kind": "layer", "layer": f"qwen3-32b.{name}", "group": "qwen3-32b", "m": 1}
        point |= {"dense": 0.25, "floor_us": 6.0, "n": N, "k": K, "run": 0}
        points.append(point | {"times": {rival: {"us": t} for rival, t in times.items()}})
    device = {"name": "a GPU", "multiprocessors": 132}
    run = {"created": "2020-01-02", "commit": "0123456789", "device": device}
    return {"runs": [run | {"versions": {"torch": "3.4"}}], "points": points, "configs": []}


def test_only_points_that_miss_are_counted():
    from gemm import counters

    (point,) = counters.missed_points(sweep()["points"])
    assert point == counters.Point("qwen3-32b.o", 1, 0.25, "cublas_row")
    assert counters.missed_points(sweep()["points"], [0.5]) == []
    assert counters.missed_points(sweep(us=11.0)["points"]) == []


def test_a_sum_that_misses_counts_its_layers():
    from gemm import counters

    points = sweep(us=11.0)["points"]
    total = points[0] | {"kind": "model", "layer": "qwen3-32b"}  # asks for 1.5 and reaches 1.36
    found = counters.missed_points([*points, total])
    assert [p.layer for p in found] == ["qwen3-32b.o", "qwen3-32b.qkv"]


def test_what_says_most_comes_first():
    """Layers that miss alone before others of a sum, 256 tokens before 1, cuSPARSELt's last."""
    from gemm import counters

    o, qkv = sweep(us=20.0)["points"]
    total = o | {"kind": "model", "layer": "qwen3-32b"}
    sparse = o | {"dense": 0.0, "times": o["times"] | {"cusparselt": {"us": 19.0}}}
    dense = o | {"dense": 1.0, "m": 256}
    found = counters.missed_points([qkv, o, total, sparse, dense])
    assert [(p.layer, p.m, p.dense, p.rival) for p in found] == [
        ("qwen3-32b.o", 256, 1.0, "cublas_row"),
        ("qwen3-32b.o", 1, 0.25, "cublas_row"),
        ("qwen3-32b.qkv", 1, 0.25, "cublas_row"),
        ("qwen3-32b.o", 1, 0.0, "cusparselt"),
    ]


def test_no_point_starts_after_its_time(capsys):
    import torch
    from counters import Work
    from gemm import counters

    point = counters.Point("qwen3-32b.o", 1, 0.25, "cublas_row")
    assert list(Work(torch.device("cpu"), []).launch([point, point], budget_s=-1)) == []
    assert "left out 2 points:\n  qwen3-32b.o, M = 1, 0.25 dense" in capsys.readouterr().out


def test_counters_that_ncu_lacks_are_left_out():
    from gemm import counters

    assert set(counters.known_metrics(LISTING).values()) == {
        *COLUMNS,
        "dram__bytes_read.sum",
    }
    assert counters.known_metrics("") == counters.METRICS
    older = LISTING.replace("sm__pipe_tensor_cycles", "sm__pipe_tensor_op_hmma_cycles")
    assert "tensor_hmma_pct" in counters.known_metrics(older)


def test_launches_belong_to_points():
    from gemm import counters

    found = counters.launches(log(), counters.known_metrics(LISTING))
    assert [launch["ns"] for launch in found] == [10000, 5000, 5000]
    points = [counters.Point("qwen3-32b.o", 1, d, "cublas_row") for d in (0.25, 1.0)]
    (entry,) = counters.by_point(points[:1], found)
    assert entry["ours"]["config"] == "t128x16_c1_s8x13"
    assert [launch["kernel"] for launch in entry["theirs"]] == [NVJET, "splitK_reduce"]
    with pytest.raises(ValueError, match="expected 2 launches of hybrid_gemm, got 1"):
        counters.by_point(points, found)
    sparse, dense = counters.by_point(points, [*found, found[0] | {"ns": 11000.0}])
    assert (sparse["ours"]["ns"], dense["ours"]["ns"]) == (10000, 11000)
    assert sparse["theirs"] == dense["theirs"], "cuBLASLt's work is the same: launched once"


def test_shares_of_the_units():
    from gemm import counter_table, counters

    ours, *rival = counters.launches(log(), counters.known_metrics(LISTING))
    found = counter_table.shares(ours, 132, y_bytes=2 * N)
    assert found.units == pytest.approx({"tensor": 0.305, "port": 0.5, "l2": 0.55, "dram": 0.85})
    assert (found.us, found.busy, found.fixup) == pytest.approx((10.0, 0.8, 0.1))
    assert found.binding() == "DRAM"
    slack = counter_table.shares(ours | {"dram_read_pct": 50, "cycles_active": 9000}, 132, 0)
    assert slack.binding() == "no unit (L2 first), idle SMs"
    both = counter_table.together(rival, 132)
    assert both.us == pytest.approx(10.0)
    assert both.units["port"] == pytest.approx(0.25)


def test_a_run_and_its_table(monkeypatch, tmp_path, capsys):
    """With a program in ncu's place that runs the launches and writes a log."""
    from gemm import counter_table

    (tmp_path / "listing").write_text(LISTING)
    (tmp_path / "log").write_text(log())
    program = tmp_path / "ncu"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --query-metrics ] && exec cat {tmp_path / "listing"}\n'
        f"cp {tmp_path / 'log'} {tmp_path / 'counters.csv'}\n"
        'while [ "${1%python*}" = "$1" ]; do shift; done\nexec "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(BENCH.parent))
    (tmp_path / "sweep.json").write_text(json.dumps(sweep()))
    words = ["--sweep", tmp_path / "sweep.json", "--json", tmp_path / "counters.json"]
    monkeypatch.setattr(sys, "argv", ["counters", *map(str, words), "--device", "cpu"])
    assert importlib.import_module("counters").main() == 0
    assert "1 of 1 points" in capsys.readouterr().out
    counted = json.loads((tmp_path / "counters.json").read_text())
    counted["run"]["device"]["multiprocessors"] = 132
    lines = counter_table.table(counted, sweep()).splitlines()
    assert len(lines) == 5
    swept = "| qwen3-32b.o | 1 | 25% | 1.35 x cuBLASLt | **1.250** | 12.0 | 50% |"
    assert lines[2] == (
        f"{swept} 10.0 | t128x16_c1_s8x13 "
        "| 30% | 50% | 55% | 85% | 80% | 10% | 10.0 | 20% | 25% | 80x64_128x11 + splitK_reduce "
        "| DRAM |"
    )
    assert "at 1.50 to 1.50 GHz" in lines[-1]
    assert "Not counted" not in lines[-1]
    lines = counter_table.table(counted | {"points": []}, sweep()).splitlines()
    assert lines[2] == swept + "  |" * 13
    assert "Not counted in that run: 1 of 1 layers." in lines[-1]
