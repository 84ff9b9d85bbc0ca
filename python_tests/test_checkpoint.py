# SPDX-License-Identifier: Apache-2.0
"""Model checkpoints: round trips, atomic writing, refusals."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import spense_kernels
from spense_kernels import env
from spense_kernels.checkpoint import (
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from spense_kernels.checkpoint import save as save_module
from spense_kernels.errors import CheckpointError
from spense_kernels.linear import SpenseLinear
from spense_kernels.testing.generators import random_split, random_weight
from spense_kernels.testing.models import TINY, prune_magnitude, tiny_model
from spense_kernels.testing.numeric import assert_bitwise

TOKENS = torch.arange(18).reshape(2, 9) * 5 % 120


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    state_a, state_b = a.state_dict(), b.state_dict()
    assert state_a.keys() == state_b.keys()
    for name, tensor in state_a.items():
        assert_bitwise(state_b[name], tensor)
    buffers = dict(b.named_buffers())
    for name, buffer in a.named_buffers():
        assert_bitwise(buffers[name], buffer)
    assert_bitwise(logits(b), logits(a))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return prune_magnitude(tiny_model("LlamaForCausalLM"))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    provenance = {"method": "magnitude", "seed": 0}
    return save_checkpoint(model, tmp_path_factory.mktemp("c") / "m", provenance=provenance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", TINY)
def test_round_trips(architecture, dtype, tmp_path):
    """Once into one file, and again into many; models, buffers, ties and notes stay the same."""
    model = prune_magnitude(tiny_model(architecture, dtype))
    save_checkpoint(model, tmp_path / "a", provenance={"seed": 3})
    first = load_checkpoint(tmp_path / "a")
    assert type(first) is type(model)
    assert_same_model(model, first)
    assert not any(p.requires_grad or p.is_meta for p in first.parameters())
    assert not any(b.is_meta for b in first.buffers())
    assert not first.training
    save_checkpoint(first, tmp_path / "b", max_shard_bytes=30_000)
    assert len(list((tmp_path / "b").glob("model-*-of-*.safetensors"))) > 1
    second = load_checkpoint(tmp_path / "b")
    assert_same_model(model, second)
    tied = model.config.tie_word_embeddings
    for loaded in (first, second):
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert loaded.config.quantization_config["provenance"]["seed"] == 3
    assert verify_checkpoint(tmp_path / "a").ok
    assert verify_checkpoint(tmp_path / "b").ok
    with torch.no_grad():
        made = second.generate(TOKENS, max_new_tokens=3, do_sample=False)
        assert torch.equal(made, model.generate(TOKENS, max_new_tokens=3, do_sample=False))


def test_saving_is_reproducible(model, saved, tmp_path):
    again = save_checkpoint(model, tmp_path / "m", provenance={"method": "magnitude", "seed": 0})
    assert (again / "SHA256SUMS").read_text() == (saved / "SHA256SUMS").read_text()
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=again, capture_output=True)
    assert done.returncode == 0


def test_staircases_shards_and_a_converted_head(tmp_path):
    """Any split per layer; some layers left dense; the (tied) output embedding converted."""
    model = tiny_model("Qwen3ForCausalLM")
    for i, (name, linear) in enumerate(list(model.named_modules())):
        if isinstance(linear, nn.Linear) and "k_proj" not in name:
            n, k = linear.weight.shape
            split = random_split(n, k, 2 if k % 32 == 0 else 1, seed=i)
            model.set_submodule(name, SpenseLinear.from_hybrid(random_weight(split, seed=i)))
    save_checkpoint(model, tmp_path / "m")
    loaded = load_checkpoint(tmp_path / "m")
    assert_same_model(model, loaded)
    assert isinstance(loaded.lm_head, SpenseLinear)
    kinds = {n.rsplit(".", 1)[-1] for n, m in loaded.named_modules() if type(m) is nn.Linear}
    assert kinds == {"k_proj"}
    assert verify_checkpoint(tmp_path / "m").ok


def test_an_untied_head_is_saved_as_untied(tmp_path):
    model = prune_magnitude(tiny_model("Gemma3ForCausalLM"))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2, requires_grad=False)
    save_checkpoint(model, tmp_path / "m")
    loaded = load_checkpoint(tmp_path / "m")
    assert_same_model(model, loaded)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert model.config.tie_word_embeddings  # the given model stays as it was


def test_dtype_casts_only_what_is_not_converted(saved):
    wide = load_checkpoint(saved, dtype=torch.float32)
    narrow = load_checkpoint(saved)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    for name, layer in wide.named_modules():
        if isinstance(layer, SpenseLinear):
            assert layer.hybrid_weight().equal(narrow.get_submodule(name).hybrid_weight())
    assert wide(TOKENS).logits.dtype == torch.float32


def test_tokenizer_and_generation_config_come_along(model, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    save_checkpoint(model, tmp_path / "m", tokenizer=tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert loaded("hello x")["input_ids"] == [1, 0]
    assert load_checkpoint(tmp_path / "m").generation_config.eos_token_id == 2


def test_files_say_what_they_are(saved):
    config = json.loads((saved / "config.json").read_text())
    said = config["quantization_config"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert said["quant_method"] == "spense"
    assert said["version"] == 1
    assert "import spense_kernels" in said["note"]
    assert said["modules"]["model.layers.1.mlp.down_proj"] == {
        "n": 64,
        "k": 96,
        "k_shards": 1,
        "bias": False,
    }
    assert said["modules_to_not_convert"] == ["lm_head"]
    assert said["provenance"]["versions"].keys() == {
        "python",
        "spense-kernels",
        "torch",
        "transformers",
    }


def test_a_build_on_the_path_need_not_be_installed(model, tmp_path, monkeypatch):
    def installed(name: str) -> str:
        if name == "spense-kernels":
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr(env, "version", installed)
    save_checkpoint(model, tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert said["provenance"]["versions"]["spense-kernels"] == spense_kernels.__version__


def test_inspect_counts_bytes(model, saved):
    found = inspect_checkpoint(saved)
    layers = {layer["name"]: layer for layer in found["layers"]}
    for name, module in model.named_modules():
        if isinstance(module, SpenseLinear):
            layer = layers.pop(name)
            assert layer["bytes_per_token"] == sum(b.nbytes for b in module.buffers())
            assert layer["packed_bytes"] == module.w_packed.numel()
            stored = module.state_dict().values()
            assert layer["checkpoint_bytes"] == sum(t.nbytes for t in stored)
            assert layer["dense_width"] == module.split.widths
            assert sum(layer["widths"].values()) == module.split.tiles
    assert not layers
    total = sum(layer["checkpoint_bytes"] for layer in found["layers"]) + found["other_bytes"]
    header = 8 + int.from_bytes((saved / "model.safetensors").read_bytes()[:8], "little")
    assert total + header == (saved / "model.safetensors").stat().st_size
    assert found["provenance"]["method"] == "magnitude"


def test_never_overwrites_silently(model, saved, tmp_path):
    target = shutil.copytree(saved, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"m exists; nothing was written"):
        save_checkpoint(model, target)
    (target / "old").touch()
    save_checkpoint(model, target, overwrite=True)
    assert not (target / "old").exists()
    assert verify_checkpoint(target).ok
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").touch()
    with pytest.raises(CheckpointError, match="is no spense checkpoint, so it is not overwritten"):
        save_checkpoint(model, other, overwrite=True)
    (tmp_path / "empty").mkdir()
    save_checkpoint(model, tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "m", "photos"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_behind(model, saved, tmp_path, existing):
    """The kernel refuses to let any file grow past 20 kB, as it refuses on a full disk."""
    target = tmp_path / "m"
    if existing:
        shutil.copytree(saved, target)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*m: .*File too large"):
            save_checkpoint(model, target, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == (["m"] if existing else [])
    assert not existing or verify_checkpoint(target).ok


def test_a_failing_rename_puts_the_old_checkpoint_back(model, saved, tmp_path, monkeypatch):
    target = shutil.copytree(saved, tmp_path / "m")
    rename = Path.rename

    def fail(self, new):
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, new)

    monkeypatch.setattr(save_module.Path, "rename", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*Input/output error"):
        save_checkpoint(model, target, overwrite=True)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert verify_checkpoint(target).ok


def test_other_failures_leave_nothing_behind(model, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(model, tmp_path / "m", tokenizer=Tokenizer())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(model, tmp_path / "file" / "m")


def test_contradicting_generation_flags_cost_a_warning_only(tmp_path):
    model = prune_magnitude(tiny_model("LlamaForCausalLM"))
    model.generation_config.cache_implementation = "no such cache"
    with pytest.warns(UserWarning, match="generation_config was not saved"):
        save_checkpoint(model, tmp_path / "m")
    assert verify_checkpoint(tmp_path / "m").ok


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: None, "expected SpenseLinear layers, found none"),
        (
            lambda m: m.set_submodule("model.layers.0.mlp.up_proj", SpenseLinear(64, 96)),
            "layer model.layers.0.mlp.up_proj has no weight yet",
        ),
        (lambda m: prune_magnitude(m).model.norm.to("meta"), "model.norm.weight is on the meta"),
    ],
)
def test_unfinished_models_are_refused(change, words, tmp_path):
    model = tiny_model("LlamaForCausalLM")
    change(model)
    with pytest.raises(CheckpointError, match=words):
        save_checkpoint(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_provenance_must_be_json(model, tmp_path):
    for bad in ({"a": torch.ones(1)}, {"a": float("nan")}):
        with pytest.raises(CheckpointError, match="provenance: expected plain JSON values"):
            save_checkpoint(model, tmp_path / "m", provenance=bad)


def test_a_checkpoint_saved_by_transformers_loads(saved, tmp_path):
    """Without our checksums, but with everything else checked."""
    load_checkpoint(saved).save_pretrained(tmp_path / "m")
    assert_same_model(load_checkpoint(saved), load_checkpoint(tmp_path / "m"))
    report = verify_checkpoint(tmp_path / "m")
    assert report.ok
    assert [note.split(":")[0] for note in report.notes] == [
        "SHA256SUMS",
        "some tensors have no checksum",
    ]
