# SPDX-License-Identifier: Apache-2.0
"""docs/format.md: its worked example is true, and a reader written from it alone works."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from spense_kernels.checkpoint import save_checkpoint
from spense_kernels.format import HybridWeight, Split
from spense_kernels.format.tile_stream import value_offsets
from spense_kernels.linear import SpenseLinear
from spense_kernels.testing.generators import random_split, random_weight
from spense_kernels.testing.models import tiny_model

PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text()


def example() -> dict:
    blocks = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    data = json.loads(blocks[0])
    for name in ("values", "indices", "dense"):
        data[name] = bytes.fromhex(data[name])
    data["weight"] = [bytes.fromhex(row) for row in data["weight"]]
    return data


def read_layer(n: int, k: int, tensors: dict) -> list[list[int]]:
    """FP8 bytes [n][k] from plain bytes and lists: sections 1 and 2 of the page, nothing else."""
    perm, width = tensors["k_perm"], tensors["dense_width"]
    shards = len(perm)
    c = k // shards
    weight = [[0] * k for _ in range(n)]
    at = {"values": 0, "indices": 0, "dense": 0}
    for s in range(shards):
        for t in range(-(-n // 128)):
            sparse = c - width[t]
            groups = -(-sparse // 4)
            for row in range(128 * t, min(n, 128 * t + 128)):
                line = [0] * (4 * groups)
                for g in range(groups):
                    both = tensors["indices"][at["indices"] + g // 2]
                    nibble = both >> 4 if g % 2 else both & 15
                    line[4 * g + (nibble & 3)] = tensors["values"][at["values"] + 2 * g]
                    line[4 * g + (nibble >> 2)] = tensors["values"][at["values"] + 2 * g + 1]
                dense = tensors["dense"][at["dense"] : at["dense"] + width[t]]
                for p, byte in enumerate([*line[:sparse], *dense]):
                    weight[row][s * c + perm[s][p]] = byte
                at["values"] += 2 * groups
                at["indices"] += -(-groups // 2)
                at["dense"] += width[t]
    assert at == {name: len(tensors[name]) for name in at}
    return weight


def test_worked_example():
    data = example()
    split = Split(2, 26, torch.tensor(data["k_perm"]), torch.tensor(data["dense_width"]))
    weight = torch.tensor([list(row) for row in data["weight"]], dtype=torch.uint8)
    hybrid = HybridWeight.from_dense(weight, torch.ones(2), split)
    for name in ("values", "indices", "dense"):
        assert bytes(getattr(hybrid, name).tolist()) == data[name]
    read = read_layer(2, 26, data)
    assert read == [[0 if b == 0x80 else b for b in row] for row in data["weight"]]


def test_numbers_in_the_packed_section():
    places = value_offsets()
    assert [int(places[9, j]) for j in (66, 67)] == [1234, 1235]
    assert "at bytes 1234 and\n1235 of the unit" in PAGE
    # Row 9, group 33 of an otherwise empty sparse unit.
    split = Split.uniform(128, 256, 0)
    weight = torch.zeros(128, 256, dtype=torch.uint8)
    weight[9, 133], weight[9, 135] = 0x38, 0x40
    stream = HybridWeight.from_dense(weight, torch.ones(128), split).pack().w_packed
    assert stream[:16384].nonzero().flatten().tolist() == [1234, 1235]
    assert (stream[16384:] != 0x44).nonzero().flatten().tolist() == [18576 - 16384]
    assert stream[18576] == 0xD4
    assert "high half of byte 18576" in PAGE


@pytest.mark.parametrize("seed", range(3))
def test_a_reader_from_the_page_reads_a_checkpoint(seed, tmp_path):
    """Opens the files with json and bytes only: header, checksums, split, payload."""
    model = tiny_model("LlamaForCausalLM")
    weights = {}
    for i, short in enumerate(("q_proj", "o_proj", "v_proj")):
        name = f"model.layers.0.self_attn.{short}"
        n, k = model.get_submodule(name).weight.shape
        split = random_split(n, k, (1, 2, 4)[(i + seed) % 3], seed=seed + i)
        weights[name] = random_weight(split, seed)
        model.set_submodule(name, SpenseLinear.from_hybrid(weights[name]))
    save_checkpoint(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    raw = (tmp_path / "m" / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__")

    def data(name: str) -> bytes:
        begin, end = header[name]["data_offsets"]
        piece = raw[8 + size + begin : 8 + size + end]
        line = f"{header[name]['dtype']} {','.join(map(str, header[name]['shape']))}\n"
        digest = hashlib.sha256(line.encode() + piece).hexdigest()
        assert metadata[f"sha256.{name}"] == digest
        return piece

    def numbers(name: str) -> list[int]:
        piece = data(name)
        assert header[name]["dtype"] == "I32"
        return [int.from_bytes(piece[i : i + 4], "little") for i in range(0, len(piece), 4)]

    for name in header:
        data(name)
    assert config["modules"].keys() == weights.keys()
    for name, facts in config["modules"].items():
        n, k, shards = facts["n"], facts["k"], facts["k_shards"]
        flat = numbers(f"{name}.k_perm")
        tensors = {part: data(f"{name}.{part}") for part in ("values", "indices", "dense")}
        tensors["k_perm"] = [flat[i : i + k // shards] for i in range(0, k, k // shards)]
        tensors["dense_width"] = numbers(f"{name}.dense_width")
        assert read_layer(n, k, tensors) == weights[name].to_dense().tolist()


def test_the_page_names_what_the_code_uses():
    from spense_kernels.checkpoint.config import SpenseConfig
    from spense_kernels.format.validate import TENSORS

    for key in SpenseConfig(modules={}).to_dict():
        assert f"| `{key}` |" in PAGE
    for name in (*TENSORS, "bias"):
        assert f".{name}`" in PAGE
