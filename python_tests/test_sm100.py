# SPDX-License-Identifier: Apache-2.0
"""Configs, budgets and choice of the SM100 family, its document and the steps for a B200."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from spense_kernels import _C

ROOT = Path(__file__).parents[1]
SM100 = _C.sm100
CONFIGS = {c["name"]: c for c in SM100.configs()}
N, K = 10240, 5120


def packed_bytes(n: int, k: int, sparse_units: int) -> int:
    dense = _C.format.padded_k(k) // 128 - 2 * sparse_units
    return _C.format.tile_count(n) * _C.format.tile_bytes(sparse_units, dense)


QUARTER = packed_bytes(N, K, 15)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_budgets(config):
    assert config["smem_bytes"] <= config["smem_limit"]
    assert config["tmem_columns"] * config["residency"] <= 512
    columns = config["accumulators"] * config["tokens"] + 8 * config["w_stages"]
    assert config["tmem_used"] == columns <= config["tmem_columns"]
    assert config["accumulators"] == (2 if config["tokens"] <= 224 else 1)
    assert config["tmem_columns"] in (32, 64, 128, 256, 512)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_names_say_what_the_config_is(config):
    name = "t{rows}x{tokens}_g{ctas}_s{w_stages}x{x_stages}_o{residency}".format(
        rows=128 * config["ctas"] * config["pairs"], **config
    )
    assert name == config["name"]


@pytest.mark.parametrize(
    ("m", "tokens"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (100, 128)]
)
def test_decode_takes_the_tile_that_fits(m, tokens):
    assert CONFIGS[SM100.choose(m, N, K, QUARTER)]["tokens"] == tokens


@pytest.mark.parametrize("m", [256, 1000, 4096, 65536])
def test_prefill_takes_pairs(m):
    assert CONFIGS[SM100.choose(m, N, K, QUARTER)]["ctas"] == 2


@pytest.mark.parametrize("m", [1, 16, 64, 128, 257, 2048])
def test_the_choice_is_the_smallest_tile_about_as_fast_as_the_fastest(m):
    times = {n: SM100.estimate(n, m, N, K, QUARTER)["total_us"] for n in CONFIGS}
    chosen, least = SM100.choose(m, N, K, QUARTER), min(times.values())
    good = [name for name, us in times.items() if us <= 1.05 * least]
    assert chosen in good
    assert CONFIGS[chosen]["tokens"] == min(CONFIGS[name]["tokens"] for name in good)


def test_estimates_by_hand():
    # One tile row of 128, all dense, 16 tokens: 8 units of four instructions of 8 clocks.
    e = SM100.estimate("t128x16_g1_s4x14_o2", 16, 128, 1024, 8 * 16384, multiprocessors=1)
    assert e["tensor_us"] == pytest.approx(8 * 4 * 8 / 1850)
    assert e["smem_us"] == pytest.approx(8 * (16384 + 16 * 128) / 128 / 1850)
    # One CTA, two places for parts of 128 x 16 float32.
    assert e["l2_us"] == pytest.approx((8 * (16384 + 16 * 128) + 2 * 128 * 16 * 4) / 12e6)
    assert e["dram_us"] == pytest.approx((8 * 16384 + 16 * 1024 + 2 * 16 * 128) / 8e6)


def test_sparse_units_halve_the_tensor_time():
    dense = packed_bytes(N, K, 0)
    sparse = packed_bytes(N, K, K // 256)
    name = "t512x192_g2_s5x9_o1"
    times = [SM100.estimate(name, 4096, N, K, size)["tensor_us"] for size in (dense, sparse)]
    assert times[0] == pytest.approx(2 * times[1])


def test_unknown_config_is_named():
    with pytest.raises(ValueError, match=r"config: expected one of t128x16_g1_s4x14_o2, .*got t1"):
        SM100.estimate("t1", 1, N, K, QUARTER)


def test_document_holds_what_the_script_computes():
    command = [sys.executable, ROOT / "bench" / "sm100_paper.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_steps_for_a_b200():
    command = [sys.executable, ROOT / "bench" / "b200.py", "--list"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for script in re.findall(r"\S+\.py", text):
        assert (ROOT / script).is_file(), script
    assert "SPENSE_SM100_DRAIN=0" in text
