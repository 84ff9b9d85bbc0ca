# SPDX-License-Identifier: Apache-2.0
"""The GPU sweep's logic, tried on the CPU: operands, points, merging, configurations."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spense_kernels import layout, ops
from spense_kernels.format import Split

BENCH = Path(__file__).parents[1] / "bench"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script of bench on the CPU, as a command line would, and returns what it prints."""

    def of(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return of


ON_CPU = ("--device", "cpu", "--seconds", "0")


@pytest.mark.parametrize("d", [0.0, 0.25, 1.0])
def test_random_streams_are_legal(d):
    """No NaN, only metadata that hardware defines; the op refuses a table that does not fit."""
    from gemm.operands import random_x, tile_stream, tiles_of

    split = Split.from_fraction(200, 640, d)
    stream, tiles = tile_stream(split, CPU), tiles_of(split, CPU)
    assert stream.numel() == split.packed_bytes
    units = [(at * layout.BLOCK_BYTES, s) for at, s, _, _ in tiles.tolist()[:-1]]
    for start, sparse in units:
        for unit in range(sparse):
            begin = start + unit * layout.SPARSE_UNIT_BYTES + layout.VALUE_BYTES
            for byte in stream[begin : begin + layout.METADATA_BYTES].tolist():
                assert byte & 15 in layout.LEGAL_NIBBLES
                assert byte >> 4 in layout.LEGAL_NIBBLES
    x = random_x(5, 640, CPU)
    y = ops.hybrid_gemm(x, stream, tiles, torch.ones(1), torch.ones(200), n=200, k=640)
    assert y.isfinite().all()
    assert y.abs().max() > 0


def test_two_of_four_keeps_two():
    from gemm.operands import two_of_four

    weight = two_of_four(64, 256, CPU).view(torch.uint8)
    kept = (weight.view(64, -1, 4) & 0x7F != 0).sum(-1)
    assert kept.max() == 2
    assert not weight[(weight & 0x7F) == 0x7F].any()


def test_points_are_written_and_merged(run, tmp_path):
    file = tmp_path / "a.json"
    problems = ("--layers", "256x512", "300x256", "--m", "1,8", "--dense", "0,0.25")
    text = run("gemm_sweep", *ON_CPU, *problems, "--json", file)
    first = json.loads(file.read_text())
    shapes = {(p["layer"], p["m"], p["dense"]) for p in first["points"]}
    assert len(shapes) == len(first["points"]) == 8
    assert "geomean" in text
    assert all(p["times"]["spense"]["us"] > 0 for p in first["points"])

    more = ("--layers", "256x512", "--m", "8,16", "--merge", file, "--json", file)
    run("gemm_sweep", *ON_CPU, *more)
    both = json.loads(file.read_text())
    assert len(both["points"]) == 9
    assert len(both["runs"]) == 2
    newer = [p for p in both["points"] if p["run"] == 1]
    assert {(p["layer"], p["m"], p["dense"]) for p in newer} == {
        ("256x512", 8, 0.25),
        ("256x512", 16, 0.25),
    }


def test_a_sweep_goes_on_after_a_library_broke_the_gpu(run, tmp_path, monkeypatch):
    import gemm_sweep
    from gemm import workload
    from gemm.lost import DeviceLost

    def breaks(self, m):
        if m == 8 and "300x640" not in self.avoid:
            raise DeviceLost(["300x640:7"] if not self.avoid else ["300x640"])
        return calls(self, m)

    def anew(arguments):
        raise Restart(arguments)

    class Restart(Exception):
        pass

    calls = workload.Workload.calls
    monkeypatch.setattr(workload.Workload, "calls", breaks)
    monkeypatch.setattr(gemm_sweep, "start_anew", anew)
    file = tmp_path / "sweep.json"
    words = [*ON_CPU, "--layers", "300x640", "--m", "1,8,16", "--json", file]
    for avoid in (["300x640:7"], ["300x640:7", "300x640"]):
        with pytest.raises(Restart) as stopped:
            run("gemm_sweep", *words)
        words = stopped.value.args[0]
        assert words[-len(avoid) - 1 :] == ["--avoid", *avoid]
    run("gemm_sweep", *words)
    result = json.loads(file.read_text())
    assert [(p["m"], p["run"]) for p in result["points"]] == [(1, 0), (8, 2), (16, 2)]
    assert result["runs"][2]["avoided"] == avoid


def test_what_breaks_the_gpu_again_and_again_is_left_out():
    from gemm.lost import avoided
    from gemm.rivals import CusparseLt
    from gemm.shapes import Layer

    assert avoided(["4x8:1"], ["4x8:2"]) == ["4x8:1", "4x8:2"]
    assert avoided(["4x8:1", "4x8:2"], ["4x8:3"]) == ["4x8:1", "4x8:2", "4x8:3", "4x8"]
    assert avoided(["4x8:1", "4x8:2"], ["4x16:3"]) == ["4x8:1", "4x8:2", "4x16:3"]
    with pytest.raises(RuntimeError, match="broke the GPU"):
        CusparseLt(Layer("", "", 4, 16), CPU, quick=len, columns=8, avoid=["4x8"])


def test_a_program_starts_anew_in_its_own_place(tmp_path):
    program = tmp_path / "again.py"
    program.write_text(
        "import sys\nfrom gemm.lost import start_anew\nprint(sys.argv[1:])\n"
        "start_anew([*sys.argv[1:], 'b']) if len(sys.argv) < 3 else sys.exit(5)\n"
    )
    paths = os.pathsep.join([str(BENCH), str(BENCH.parent)])
    done = subprocess.run(
        [sys.executable, program, "a"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("['a']\n['a', 'b']\n", 5), done.stderr


def test_a_model_has_a_line_for_its_layers_together():
    from gemm.shapes import MODELS, is_model, parse_layers

    qwen = MODELS["qwen3-32b"]
    assert parse_layers(["qwen3-32b", "7168x2048"])[0] == qwen
    assert is_model(parse_layers(["qwen3-32b"])[0])
    assert not is_model(parse_layers(["qwen3-32b.o", "qwen3-32b.qkv"])[0])
    with pytest.raises(SystemExit, match=r"--layers: expected .* got qwen3-33b"):
        parse_layers(["qwen3-33b"])


def test_every_configuration_is_timed(run, tmp_path):
    file = tmp_path / "configs.json"
    arguments = ("--layers", "130x256", "--m", "2", "--configs", "all", "--json", file)
    assert "regret" in run("gemm_sweep", *ON_CPU, *arguments)
    names = [entry["config"] for entry in json.loads(file.read_text())["configs"]]
    assert names[0] == "auto"
    assert {"portable", "reference"} <= set(names)


def test_a_named_grid_of_problems(run, tmp_path, monkeypatch):
    from gemm import shapes

    monkeypatch.setitem(shapes.GRIDS, "smooth", shapes.Grid(["130x256"], [1, 3], [0.0, 0.5]))
    file = tmp_path / "grid.json"
    text = run("gemm_sweep", "--device", "cpu", "--grid", "smooth", "--json", file)
    assert "4 problems: regret mean" in text
    shapes = {(c["m"], c["dense"]) for c in json.loads(file.read_text())["configs"]}
    assert shapes == {(1, 0.0), (3, 0.0), (1, 0.5), (3, 0.5)}


def invented_configs(dense: list[float]) -> dict:
    """The choice is the best at M = 1 and 10 % slower than the best at M = 8."""
    configs = []
    for d in dense:
        for m, auto in ((1, 9.9), (8, 11.0)):
            for name, us in (("auto", auto), ("a:whole", 10.0), ("b:stream", 12.0)):
                shape = {"layer": "256x512", "m": m, "dense": d, "run": 0}
                configs.append(shape | {"config": name, "us": us})
    return {"runs": invented_results()["runs"], "configs": configs}


def test_the_regret_of_a_choice():
    from gemm import regret

    found = regret.points(invented_configs([0.25]))
    assert [p.best for p in found] == ["auto", "a:whole"]
    assert [p.regret for p in found] == pytest.approx([0, 0.1])
    assert "2 problems: regret mean 5.00%, worst 10.0%, 1 above 5%" in regret.summary(found)
    by_m = regret.by_layer(invented_configs([0.25])).splitlines()
    assert by_m[0] == "| layer | M = 1 | M = 8 | mean |"
    assert by_m[2] == "| 256x512 | 0.0% | 10.0% | 5.0% |"
    several = regret.by_layer(invented_configs([0.0, 0.125]))
    assert "| layer | 0 % | 12.5 % | mean |" in several
    assert "| 256x512 | 5.0% / 10.0% | 5.0% / 10.0% | 5.0% |" in several
    assert "256x512, M = 8, 12.5 % dense 10.0%, `a:whole` is faster" in several


def test_the_regret_of_what_the_model_chooses_now():
    """The file's "auto" does not count, the forced run of the model's choice does."""
    from gemm import regret

    from spense_kernels import _C
    from spense_kernels.format import Split

    shape = {
        "n": 5120,
        "k": 8192,
        "packed_bytes": Split.from_fraction(5120, 8192, 0.25).packed_bytes,
    }
    results = invented_configs([0.25])
    for entry in results["configs"]:
        entry |= shape
        if entry["config"] == "b:stream" and entry["m"] == 8:
            entry["config"] = _C.sm90.estimate(8, *shape.values())["config"]
    at_1, at_8 = regret.points(regret.chosen_anew(results))
    assert at_1.regret == pytest.approx(regret.UNTIMED)  # nothing has the name of the choice
    assert at_8.regret == pytest.approx(0.2)
    assert (at_8.auto_us, at_8.best, at_8.forced) == (12.0, "a:whole", 2)


def test_a_doubtful_choice_is_timed_again():
    from gemm.choices import Choices
    from gemm.rivals import Spense
    from gemm.shapes import Layer
    from gemm.timing import Recorder

    class Slow(Recorder):
        """auto seems 10 % slower than the rest, then is not."""

        def measure(self, recordings, seconds, min_rounds=7):
            asked.append(set(recordings))
            late = 11.0 if len(asked) == 1 else 10.0
            return {name: {"us": late if name == "auto" else 10.0} for name in recordings}

    asked: list[set[str]] = []
    names = ["avx2", "portable", "reference", "no_such"]
    choices = Choices(Slow(CPU), names, 1e12)
    choices._chosen = lambda spense, m: "portable"
    times = choices.measure(Spense(Layer("", "a", 130, 256), 0.25, CPU), 2)
    assert [len(names) for names in asked] == [len(times), min(4, len(times))]
    assert "auto" in asked[1]
    assert "no_such" not in times
    assert times["auto"]["us"] == 10.0
    assert times["auto"]["choice"] == "portable"


def test_the_choice_is_timed_however_slow_it_seemed():
    from gemm.choices import near_of

    us = {"auto": 30.0, "a:whole": 10.0, "b:whole": 11.9, "b:stream": 12.1, "c:whole": 25.0}
    assert near_of(us, 1.2, ("auto", "c:whole")) == {"auto", "a:whole", "b:whole", "c:whole"}


def test_two_libraries_split_where_cusparselt_survives():
    from gemm.rivals import sparse_columns

    from spense_kernels.format import Split

    found = [sparse_columns(Split.from_fraction(5120, 5120, d)) for d in (0, 0.125, 0.25, 1)]
    assert found == [5120, 4608, 3840, 0]  # 4480, a multiple of 128 alone, breaks it


def test_the_quantiser_s_figures(run, tmp_path):
    file = tmp_path / "quantize.json"
    arguments = ("--layers", "130x256", "--m", "1,70", "--pack", "200x512", "--json", file)
    run("quantize", *ON_CPU, *arguments)
    result = json.loads(file.read_text())
    assert [row["m"] for row in result["rows"]] == [1, 70]
    for row in result["rows"]:
        us = {name: summary["us"] for name, summary in row["times"].items()}
        assert row["added_us"] == pytest.approx(us["chain"] - us["gemm"], abs=1e-3)
    assert result["pack"][0]["ms"] > 0


def test_the_floor_is_bytes_or_arithmetic():
    from gemm.ceiling import bytes_moved, floor_us
    from gemm.shapes import Layer

    layer = Layer("", "", 51200, 5120)
    split = Split.from_fraction(layer.n, layer.k, 0.25)
    assert split.packed_bytes == 51200 * (3840 * 5 // 8 + 1280)
    assert floor_us(layer, split, 1, 3.1e12) == pytest.approx(
        1e6 * bytes_moved(split, 1) / 3.1e12, rel=1e-9
    )
    flops = 2 * 8192 * layer.n
    busy = flops * (3840 / 2880e12 + 1280 / 1650e12) * 1e6
    assert floor_us(layer, split, 8192, 3.1e12) == pytest.approx(busy, rel=1e-9)


def invented_results() -> dict:
    """A result file with easy ratios: cuBLASLt takes twice our time, two libraries 1.5 times."""
    from gemm.shapes import MODELS

    points = []
    for group, layers in MODELS.items():
        for m in (1, 64, 4096):
            facts = {"group": group, "m": m, "dense": 0.25, "dense_fraction": 0.25, "run": 0}
            facts |= {"floor_us": 8.0, "flops": m * 10**9, "bytes": 10**8 + m}
            times = {"spense": 10.0, "cublas_tensor": 20.0, "cublas_row": 21.0, "bf16": 40.0}
            times |= {"cusparselt": 13.0, "two_library": 14.0, "two_library_add": 15.0}
            facts["times"] = {name: {"us": us, "spread": 0.01} for name, us in times.items()}
            points.append(facts | {"kind": "model", "layer": group})
            for layer in layers:
                shape = {"n": layer.n, "k": layer.k}
                points.append(facts | shape | {"kind": "layer", "layer": layer.label})
    run = {
        "created": "2020-01-02T03:04:05Z",
        "commit": "0123456789ab",
        "device": {"name": "a GPU", "driver": "1.2"},
        "versions": {"torch": "3.4"},
        "floor_bytes_per_second": 3.1e12,
    }
    return {"runs": [run], "points": points, "configs": []}


def test_tables_of_a_result_file():
    from gemm import tables

    short = tables.short_table(invented_results()).splitlines()
    assert short[0] == (
        "| M | qwen3-32b, four layers | seed-oss-36b, four layers | slowest layer | two libraries |"
    )
    assert short[2] == "| 1 | 10.0 us, 2.00x | 10.0 us, 2.00x | 2.00x | 1.33x / 1.33x |"
    assert len(short) == 5
    full = tables.full_tables(invented_results())
    assert "a GPU, driver 1.2, torch 3.4, commit 0123456, 2020-01-02." in full
    assert "| gate_up | 51200 x 5120 | 4096 | 10.0 | 20.0 | 40.0 | 13.0 | 14.0 | 15.0 |" in full
    assert full.count("all four") == 6


def test_two_devices_beside_one_another():
    from gemm import tables

    other = invented_results()
    other["runs"][0]["device"] = {"name": "NVIDIA H200"}
    for point in other["points"]:
        point["times"] = point["times"] | {"spense": {"us": 8.0}}
    lines = tables.beside(invented_results(), other).splitlines()
    assert lines[0].startswith("| model | M | GPU, ours | H200, ours | ratio | GPU, cuBLASLt |")
    assert (
        "| qwen3-32b | 64 | 10.0 us | 8.0 us | 1.25 | 20.0 us | 20.0 us | 1.00 | 2.00x | 2.50x |"
        in lines
    )
    assert len(lines) == 2 + 2 * 3 + 2


def test_pictures_of_a_result_file(run, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "gemm_x.json"
    file.write_text(json.dumps(invented_results()))
    run("plot", file, "--out", tmp_path)
    for name in ("speedup", "roofline"):
        assert (tmp_path / f"gemm_x_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_targets_that_are_met_and_missed():
    from gemm.targets import checks, verdict

    points = invented_results()["points"]
    assert all(check.met for check in checks(points))
    point = next(p for p in points if p["layer"] == "qwen3-32b.down" and p["m"] == 64)
    point["times"]["spense"]["us"] = 15.2  # 1.32x cuBLASLt, slower than the two libraries
    assert [c.what for c in checks([point]) if not c.met] == ["x two libraries"]
    point["times"]["spense"]["us"] = 15.5
    missed = [c.what for c in checks([point]) if not c.met]
    assert missed == ["x cuBLASLt", "x two libraries"]
    point["times"]["copy_1"] = {"us": 10.0, "spread": 0.0}
    point["m"] = 32
    assert "of the copy kernel" in [c.what for c in checks([point]) if not c.met]
    assert "MISSED qwen3-32b.down" in verdict(points)
    all_dense = points[1] | {"dense": 1.0, "m": 64}
    all_dense["times"] = {"spense": {"us": 10.0}, "cublas_row": {"us": 10.4}}
    assert [c.met for c in checks([all_dense])] == [False]
    assert [c.met for c in checks([all_dense | {"m": 128}])] == [True]
