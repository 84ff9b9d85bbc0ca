# SPDX-License-Identifier: Apache-2.0
"""bench/generate.py and bench/device_agreement.py on the CPU with tiny models of transformers."""

from __future__ import annotations

import json
from dataclasses import replace

import device_agreement
import generate
import pytest
import torch
from decoding.models import MODELS, TINY
from tiny_model import save_tiny as save_tiny_model
from tiny_model import write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from spense_kernels import SpenseConfig
from spense_kernels.checkpoint import save_checkpoint
from spense_kernels.fusion import FusedPart

CPU = torch.device("cpu")


def test_generate_times_whole_models(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "SHORT", 2)
    monkeypatch.setattr(generate, "LONG", 4)
    out = tmp_path / "g.json"
    generate.main(f"--model tiny --device cpu --batch 2 --context 5 --layers 1 --out {out}".split())
    points = json.loads(out.read_text())["points"]
    assert [(point["kind"], point["host"]) for point in points] == [
        ("dense", "tuned"),
        ("dense", "plain"),
        ("spense", "tuned"),
        ("spense", "plain"),
    ]
    assert all(point["graphs"] == 0 for point in points), "the CPU's decoding is not compiled"
    assert all(point["ms"] > 0 and point["call_host_ms"] is None for point in points)
    late = f"--model tiny --device cpu --stop-after 0 --out {tmp_path / 'late.json'}"
    assert generate.main(late.split()) == 0
    assert not (tmp_path / "late.json").exists()
    model = generate.build(replace(TINY, layers=1), "spense", 0.25, CPU)
    assert type(model.model.layers[0]).__name__ == "FusedQwen3DecoderLayer"
    assert isinstance(model.model.layers[0].self_attn.k_proj, FusedPart)


def compiled_tiny(kind: str, monkeypatch):
    """A model whose decoding is compiled on the CPU as it is on CUDA."""
    model = generate.build(replace(TINY, layers=2), kind, 0.25, CPU)
    compiled = torch.compile(model.__call__, backend="eager")
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *args: True)
    monkeypatch.setattr(type(model), "get_compiled_call", lambda *args: compiled)
    return model


@pytest.mark.parametrize("kind", generate.KINDS)
def test_generate_compiles_once_for_both_rows(kind, monkeypatch):
    monkeypatch.setattr(generate, "SHORT", 3)
    monkeypatch.setattr(generate, "LONG", 6)
    model = compiled_tiny(kind, monkeypatch)
    generate.forget(CPU)
    rows = generate.measure(model, 2, 5, CPU)
    generate.forget(CPU)
    assert [row["host"] for row in rows] == ["tuned", "plain"]
    for row in rows:
        assert (row["graphs"], row["breaks"]) == (1, 0)
        assert row["call_host_ms"] > 0
    lines = [generate.text_of(row, 2, [rows[1] | {"kind": "dense", "batch": 2}]) for row in rows]
    assert ["1.000x" in line for line in lines] == [False, True]


def test_a_cache_that_is_used_again_gives_the_same_tokens(monkeypatch):
    monkeypatch.setattr(generate, "LONG", 6)
    model = compiled_tiny("spense", monkeypatch)
    prompt = torch.randint(3, 320, (1, 5))
    made = []
    plain = model.generate
    monkeypatch.setattr(
        model, "generate", lambda *args, **kwargs: made.append(plain(*args, **kwargs)) or made[-1]
    )
    cache = generate.generate(model, prompt).cache
    generate.generate(model, prompt)
    again = generate.generate(model, prompt, cache)
    generate.forget(CPU)
    assert again.cache is cache
    assert all(torch.equal(made[0].sequences, other.sequences) for other in made[1:])


@pytest.mark.parametrize("name", ["qwen3-32b", "seed-oss-36b"])
def test_generate_builds_every_model(name):
    small = {
        "hidden": 128,
        "heads": 4,
        "head_dim": 32,
        "kv_heads": 2,
        "intermediate": 256,
        "vocabulary": 128,
        "layers": 1,
    }
    for kind in generate.KINDS:
        model = generate.build(replace(MODELS[name], **small), kind, 0.25, CPU)
        with torch.no_grad():
            assert model(torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 128)


def test_devices_are_compared(tmp_path):
    """The bundle of a small model, checked on the device that made it and after it was changed."""
    dense = save_tiny_model(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=SpenseConfig(dense_fraction=0.25), dtype=torch.bfloat16
    )
    save_checkpoint(model, tmp_path / "pruned", tokenizer=AutoTokenizer.from_pretrained(dense))
    text = write_text(tmp_path / "text.txt")
    folder = str(tmp_path / "bundle")
    device_agreement.main(["make", str(tmp_path / "pruned"), folder, "--text", str(text)])
    check = ["check", folder, "--device", "cpu", "--out", str(tmp_path / "r.json")]
    assert device_agreement.main(check) == 0
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert results["single"]["largest"] == 0.0, "the same device, the same bits"
    assert results["fused"]["largest"] > 0.0
    assert results["fused"]["positions"] == 20 * 47
    stored = torch.load(tmp_path / "bundle/reference.pt")
    stored["tokens"] = [rows.roll(1, 0) for rows in stored["tokens"]]
    torch.save(stored, tmp_path / "bundle/reference.pt")
    assert device_agreement.main(check) == 1
