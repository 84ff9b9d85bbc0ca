# SPDX-License-Identifier: Apache-2.0
"""Damaged, tampered and foreign checkpoints: refused, by name of the file or tensor."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spense_kernels.checkpoint import (
    SpenseConfig,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from spense_kernels.errors import CheckpointError
from spense_kernels.testing.models import prune_magnitude, tiny_model

LAYER = "model.layers.1.mlp.down_proj"  # [64, 96]
FP8, U8 = torch.float8_e4m3fn, torch.uint8


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    model = prune_magnitude(tiny_model("Qwen2ForCausalLM"))
    return save_checkpoint(model, tmp_path_factory.mktemp("c") / "m", provenance={"seed": 0})


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "m")


def refused(folder: Path, words: str) -> None:
    """Loading and verifying both say so."""
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(folder)
    report = verify_checkpoint(folder)
    assert not report.ok
    assert any(re.search(words, problem) for problem in report.problems), report.problems
    assert json.loads(json.dumps(report.as_dict()))["ok"] is False


def rewrite(folder: Path, change) -> None:
    """Stores changed tensors as another tool would: without checksums."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "SHA256SUMS").unlink()


def edit(name: str, change):
    def apply(tensors: dict) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def spoil(name: str, place: int, byte: int):
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.view(U8).clone()
        raw.view(-1)[place] = byte
        return raw.view(tensor.dtype)

    return edit(name, apply)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.dense"), f"{LAYER}.dense: missing tensor"),
        (lambda t: t.pop(NORM), f"{NORM}: missing tensor"),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.ones(2)}),
            f"{LAYER}.weight: unexpected tensor",
        ),
        (lambda t: t.update({f"{LAYER}.bias": torch.ones(64)}), "down_proj.bias: unexpected"),
        (edit(f"{LAYER}.values", lambda t: t.view(U8)), "values: expected dtype F8_E4M3, got U8"),
        (edit(f"{LAYER}.dense", lambda t: t.to(torch.bfloat16)), "dense: expected dtype F8_E4M3"),
        (edit(f"{LAYER}.indices", lambda t: t.long()), "indices: expected dtype U8, got I64"),
        (edit(f"{LAYER}.w_scale", lambda t: t.half()), "w_scale: expected dtype F32, got F16"),
        (edit(f"{LAYER}.k_perm", lambda t: t.long()), "k_perm: expected dtype I32, got I64"),
        (edit(f"{LAYER}.values", lambda t: t[:-2]), f"{LAYER}.values: must have shape"),
        (edit(f"{LAYER}.dense", lambda t: t.view(64, -1)), f"{LAYER}.dense: must have 1 dim"),
        (edit(f"{LAYER}.w_scale", lambda t: t[:-1]), r"w_scale: must have shape \[64\], got \[63"),
        (edit(f"{LAYER}.k_perm", lambda t: t.view(2, -1)), "k_perm|dense_width"),
        (edit(f"{LAYER}.k_perm", lambda t: t // 2), f"{LAYER}: Split: k_perm must be a permu"),
        (edit(f"{LAYER}.dense_width", lambda t: t + 8), f"{LAYER}: Split: dense_width must be"),
        (edit(f"{LAYER}.w_scale", lambda t: -t), f"{LAYER}.w_scale: must be finite and pos"),
        (spoil(f"{LAYER}.indices", 5, 0x04), f"{LAYER}.indices: a nibble whose places"),
        (spoil(f"{LAYER}.values", 5, 0xFF), f"{LAYER}.values: NaN, byte 0xFF at 5"),
        (spoil(f"{LAYER}.dense", 5, 0x7F), f"{LAYER}.dense: NaN, byte 0x7F at 5"),
        (edit(NORM, lambda t: t[1:]), rf"{NORM}: expected shape \[64\], got \[63\]"),
        (edit(NORM, lambda t: t.int()), f"{NORM}: expected a floating dtype, got torch.int32"),
        (
            edit("model.layers.0.self_attn.q_proj.bias", lambda t: t * torch.nan),
            "q_proj.bias: must be finite",
        ),
    ],
)
def test_wrong_tensors_are_named(copied, change, words):
    rewrite(copied, change)
    refused(copied, words)


def test_a_legal_rewrite_loads_with_notes(copied):
    """Unused kept places in another order: legal, but no writer of this format does so."""

    def other_encoding(tensors: dict) -> None:
        values = tensors[f"{LAYER}.values"].view(U8).clone()
        indices = tensors[f"{LAYER}.indices"].clone()
        values[0:2], indices[0] = 0, indices[0] & 0xF0 | 0xE
        tensors[f"{LAYER}.values"], tensors[f"{LAYER}.indices"] = values.view(FP8), indices

    rewrite(copied, other_encoding)
    load_checkpoint(copied)
    report = verify_checkpoint(copied)
    assert report.ok
    assert f"{LAYER}: legal, but not in the canonical encoding" in report.notes


def test_nan_in_other_tensors_is_a_problem_of_verify(copied):
    rewrite(copied, edit("lm_head.weight", lambda t: t * torch.inf))
    load_checkpoint(copied)
    assert verify_checkpoint(copied).problems == ["lm_head.weight: has NaN or Inf"]


def data_span(file: Path, tensor: str) -> tuple[int, int]:
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + size])[tensor]["data_offsets"]
    return 8 + size + begin, 8 + size + end


def flip(file: Path, place: int, mask: int) -> None:
    with open(file, "r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ mask]))


@pytest.mark.parametrize(
    "tensor", [*(f"{LAYER}.{n}" for n in ("values", "indices", "dense", "k_perm")), NORM]
)
def test_a_flipped_bit_is_named(copied, tensor):
    file = copied / "model.safetensors"
    first, last = data_span(file, tensor)
    flip(file, (first + last) // 2, 1)
    refused(copied, f"{tensor}: its checksum differs: damaged data")


@settings(max_examples=60)
@given(st.data())
def test_any_flipped_byte_of_any_file_is_detected(saved, data):
    files = sorted(p.name for p in saved.iterdir())
    file = saved / data.draw(st.sampled_from(files))
    place = data.draw(st.integers(0, file.stat().st_size - 1))
    mask = data.draw(st.integers(1, 255))
    flip(file, place, mask)
    try:
        assert not verify_checkpoint(saved).ok
    finally:
        flip(file, place, mask)


def test_the_fixture_is_whole(saved):
    assert verify_checkpoint(saved).ok


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_truncated_files_are_refused(saved, seed):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: seed * 7919 % len(whole)])
    try:
        refused(saved, "model.safetensors: cannot be read")
    finally:
        file.write_bytes(whole)


def test_checksums_come_all_or_none(copied):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, metadata={f"sha256.{NORM}": "0" * 64})
    refused(copied, "checksum and tensor do not go together")


def test_missing_and_extra_files(copied):
    (copied / "README.md").write_text("mine")
    (copied / "generation_config.json").unlink()
    report = verify_checkpoint(copied)
    assert report.problems == ["generation_config.json: listed in SHA256SUMS, but missing"]
    assert report.notes == ["README.md: not listed in SHA256SUMS"]
    (copied / "model.safetensors").unlink()
    refused(copied, "expected model.safetensors or model.safetensors.index.json, found neither")
    (copied / "config.json").unlink()
    refused(copied, r"config.json: cannot be read")
    refused(copied / "nowhere", "nowhere: no such folder")


def test_bad_indices(saved, tmp_path):
    many = save_checkpoint(load_checkpoint(saved), tmp_path / "many", max_shard_bytes=30_000)
    index = many / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def with_map(**places: str | None) -> dict:
        changed = good["weight_map"] | places
        return {"weight_map": {k: v for k, v in changed.items() if v is not None}}

    for content, words in (
        ({"weight_map": []}, "expected an object weight_map"),
        (with_map(**{NORM: "../m/model.safetensors"}), "expected a file name, got '../m/"),
        (with_map(**{NORM: None}), f"{NORM}: index and file disagree"),
        (with_map(x="model-00001-of-00099.safetensors"), "00099.safetensors: cannot be read"),
        ([1], "expected a JSON object, got list"),
    ):
        index.write_text(json.dumps(content))
        refused(many, words)
    index.write_text("{")
    refused(many, "index.json: cannot be read")
    index.write_text(json.dumps(good))
    shutil.copy(saved / "model.safetensors", many)
    refused(many, "found both")


def with_layers(count: int):
    return lambda c: c.update(num_hidden_layers=count, layer_types=["full_attention"] * count)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("quantization_config"), "has no quantization_config: not a spense"),
        (
            lambda c: c.update(quantization_config=[]),
            "quantization_config: expected dict, got list",
        ),
        (lambda c: c.update(architectures=["Nothing"]), "expected a model class .* got 'Nothing'"),
        (lambda c: c.update(architectures=["torch"]), "expected a model class .* got 'torch'"),
        (lambda c: c.update(architectures=None), "expected a model class .* got None"),
        (lambda c: c.update(model_type="nothing"), "not a model config"),
        (lambda c: c.update(intermediate_size=100), r"expects \(n, k, bias\) = \(100, 64, False\)"),
        (lambda c: c.update(vocab_size=121), r"expected shape \[121, 64\], got \[120, 64\]"),
        (lambda c: c.update(num_hidden_layers=3), "(?s)not a model config: .*num_hidden_layers"),
        (with_layers(1), "the model has no 'model.layers.1"),
        (with_layers(3), r"model.layers.2.*: missing tensor"),
    ],
)
def test_bad_model_configs(copied, change, words):
    file = copied / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    refused(copied, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.update(quant_method="gptq"), "quant_method: expected 'spense', got 'gptq'"),
        (lambda q: q.update(version=2), "reads version 1, the checkpoint has version 2; a newer"),
        (lambda q: q.update(version="1"), "version: expected an integer >= 1, got '1'"),
        (lambda q: q.update(version=True), "version: expected an integer >= 1, got True"),
        (lambda q: q.pop("version"), "version: expected an integer >= 1, got None"),
        (lambda q: q.update(activation_scheme="static"), "activation_scheme: expected 'dynamic_"),
        (lambda q: q.update(surprise=1), "quantization_config: unknown key(s) surprise"),
        (lambda q: q.update(modules=[]), "modules: expected dict, got list"),
        (lambda q: q.update(modules={}), "modules: expected at least one, got none"),
        (lambda q: q.update(modules_to_not_convert="a"), "modules_to_not_convert: expected list"),
        (lambda q: q.update(modules_to_not_convert=[1]), "expected str, got int"),
        (lambda q: q.update(provenance="x"), "provenance: expected dict, got str"),
        (lambda q: q["modules"].update(x=3), "modules['x']: expected dict, got int"),
        (lambda q: q["modules"][LAYER].update(n=0), f"modules['{LAYER}'].n: expected an integer"),
        (lambda q: q["modules"][LAYER].update(k=1.5), "k: expected an integer >= 1, got 1.5"),
        (lambda q: q["modules"][LAYER].pop("k_shards"), "k_shards: expected an integer >= 1, got"),
        (lambda q: q["modules"][LAYER].pop("bias"), "bias: expected bool, got NoneType"),
        (lambda q: q["modules"][LAYER].update(m=1), f"modules['{LAYER}']: unknown key(s) m"),
        (lambda q: q["modules"][LAYER].update(k_shards=2), "k_perm: expected k_shards = 2 rows"),
        (lambda q: q["modules"].update({"lm_head2": q["modules"][LAYER]}), "has no 'lm_head2'"),
        (
            lambda q: q["modules"].update({"model.norm": q["modules"][LAYER]}),
            "expected a linear layer in the model, got Qwen2RMSNorm",
        ),
        (lambda q: q["modules"].pop(LAYER), f"{LAYER}.weight: missing tensor"),
    ],
)
def test_bad_quantization_configs(copied, change, words):
    file = copied / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    refused(copied, re.escape(words))


def test_config_round_trip(saved):
    data = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert SpenseConfig.from_dict(data).to_dict() == data


def test_inspect_refuses_too(copied):
    rewrite(copied, edit(f"{LAYER}.dense_width", lambda t: t + 8))
    with pytest.raises(CheckpointError, match=f"{LAYER}: Split: dense_width must be"):
        inspect_checkpoint(copied)
    rewrite_again = load_file(copied / "model.safetensors")
    del rewrite_again[f"{LAYER}.values"]
    rewrite_again[f"{LAYER}.dense_width"] -= 8
    save_file(rewrite_again, copied / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{LAYER}.values: missing tensor"):
        inspect_checkpoint(copied)
